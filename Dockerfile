# jaxdiff-serve with the bundled model: a page in the browser, and OpenAI's and AUTOMATIC1111's images APIs.
#
#   docker build -t jaxdiff .                              on a CPU
#   docker build -t jaxdiff --build-arg EXTRAS=serve,cuda .    NVIDIA GPUs; run with --gpus all
#   docker build -t jaxdiff --build-arg EXTRAS=serve,tpu .     TPU VMs; run with --privileged --net=host
#   docker run -p 127.0.0.1:7860:7860 -e JAXDIFF_API_KEY="$(openssl rand -hex 16)" jaxdiff
#
# Inside a container the server listens on all addresses, and so it wants a key, as for any client from another machine.
# Other flags follow the name: docker run … -v "$PWD/models:/models" jaxdiff --host=0.0.0.0 --model=/models/my-sd15
FROM python:3.13-slim-bookworm
ARG EXTRAS=serve
WORKDIR /src
COPY setup.cfg setup.py pyproject.toml README.md LICENSE ./
COPY jaxdiff jaxdiff
COPY configs configs
RUN pip install --no-cache-dir ".[${EXTRAS}]" && useradd --create-home jaxdiff
USER jaxdiff
WORKDIR /home/jaxdiff
EXPOSE 7860
HEALTHCHECK --interval=30s --start-period=300s \
    CMD python -c "import urllib.request; urllib.request.urlopen('http://127.0.0.1:7860/healthz')"
ENTRYPOINT ["jaxdiff-serve"]
CMD ["--host=0.0.0.0"]
