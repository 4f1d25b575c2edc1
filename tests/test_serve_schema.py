"""Requests made up from the server's own OpenAPI description: none is answered with a failure of the server."""

import contextlib

import numpy as np
import pytest

from jaxdiff.sampling.stepwise import Progress
from jaxdiff.serving import engine as engine_file

schemathesis = pytest.importorskip("schemathesis", reason="needs the packages of the extra test")
pytest.importorskip("uvicorn")

from hypothesis import HealthCheck, given, seed, settings  # noqa: E402
from schemathesis import checks  # noqa: E402

from tests.support.server import serving  # noqa: E402

CHECKS = [checks.not_a_server_error, checks.status_code_conformance, checks.response_schema_conformance]
pytestmark = pytest.mark.filterwarnings("ignore")  # of the packages that make up the requests


def grey(model, params, request, **more):
    """In place of drawing."""
    shape = len(request.prompts), request.settings.height, request.settings.width, 3
    yield Progress(1, 1, lambda: np.full(shape, 127, np.uint8), np.ones(shape[0], bool))


@pytest.fixture(scope="module")
def described(tiny):
    with pytest.MonkeyPatch.context() as patch, serving(tiny) as (address, engine, _):
        patch.setattr(engine_file, "draw_stepwise", grey)
        assert engine.ready.wait(120)
        schema = schemathesis.openapi.from_url(f"{address}/openapi.json")
        yield schema.exclude(path="/v1/images/files/{name}")


def test_no_request_fails_the_server(described):
    """By hypothesis itself: schemathesis' own tests of pytest know the newest pytest not yet."""
    operations = [found.ok() for found in described.get_all_operations()]
    assert {"/v1/images/generations", "/v1/images/edits", "/sdapi/v1/img2img"} <= {each.path for each in operations}
    for operation in operations:

        @settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck), database=None)
        @seed(0)
        @given(case=operation.as_strategy())
        def check(case):
            with contextlib.suppress(UnicodeError):  # of the client
                case.call_and_validate(checks=CHECKS)

        check()
