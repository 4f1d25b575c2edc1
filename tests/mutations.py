"""Does the suite notice faults? Puts small ones into a copy of the code, one at a time, and runs the tests of each.

    python -m tests.mutations                       # all of them
    python -m tests.mutations singlestep unipc      # those whose file, lines or tests contain one of the words
    python -m tests.mutations --check               # only whether each still applies to the code

Prints CAUGHT (a test fails), SURVIVED (all pass) or BROKEN (the tests do not run) for each, and exits with 1 unless all
are caught. The tests of a mutation are first run on the code as it is: if they fail there, they catch nothing.

Not collected by pytest: a run takes a minute or two a mutation. To add some, write them in the list of their folder, or
begin a list and name it in MUTATIONS.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 1800  # seconds that the tests of one mutation may take: some faults loop for ever
COPIED = ("jaxdiff", "tests", "configs", "examples", "benchmarks", "docs", "datasets")  # and the files beside them


class Mutation(NamedTuple):
    file: str
    old: str  # occurs exactly once in the file
    new: str
    tests: str  # arguments of pytest, as in a shell


def in_folder(folder: str, *rows: tuple[str, str, str, str]) -> list[Mutation]:
    return [Mutation(f"{folder}/{file}", *rest) for file, *rest in rows]


# What the tests of diffusion are called below.
GOLDEN = "tests/test_scheduler_oracle.py -k 'golden_ones and {}'"
SCHEDULERS = "tests/test_schedulers.py -k '{}'"
SAMPLING = "tests/test_sampling.py -k '{}'"
PROPERTIES = "tests/test_diffusion.py -k '{}'"
GUIDANCE = "tests/test_guidance.py -k '{}'"

DIFFUSION = in_folder(
    "jaxdiff/diffusion",
    # ---- the pieces of every scheduler
    ("base.py", "(x - time.alpha * x0) / time.sigma", "(x + time.alpha * x0) / time.sigma",
     SCHEDULERS.format("order_of_convergence and ddim")),
    ("base.py", "return time.alpha * next_time.sigma / (next_time.alpha * time.sigma)",
     "return next_time.alpha * time.sigma / (time.alpha * next_time.sigma)", GOLDEN.format("sd1-ddpm")),
    ("base.py", "jnp.maximum(1 - sigma_ratio(time, next_time) ** 2, 0.0)",
     "jnp.maximum(1 - sigma_ratio(time, next_time), 0.0)", SCHEDULERS.format("draw_the_chain and ancestral")),
    ("base.py", "jnp.sqrt(1 - fresh) * eps", "eps", SCHEDULERS.format("draw_the_chain and ancestral")),
    ("base.py", "fresh = eta**2 *", "fresh = eta *", GOLDEN.format("sd1-ddim")),
    ("base.py", "time_at(times, i + 1) if times.step_end is None else time_at(times.step_end, i)",
     "time_at(times, i + 1)", GOLDEN.format("sd1-ddim")),
    ("base.py", "jnp.clip(s, 1.0, max(max_value, 1.0))", "jnp.clip(s, 0.0, max(max_value, 1.0))",
     SCHEDULERS.format("thresholding")),
    # ---- single-step methods
    ("singlestep.py", 'time.sigma if variance_type == "fixed_large" else next_time.sigma', "next_time.sigma",
     SCHEDULERS.format("large_variance")),
    ("singlestep.py", "jnp.where(time.t > 0, scale", "jnp.where(time.t >= 0, scale",
     SCHEDULERS.format("adds_no_noise")),
    ("singlestep.py", "(next_slope - slope) / 2", "(next_slope - slope)",
     SCHEDULERS.format("order_of_convergence and heun")),
    ("singlestep.py", "m.alpha + m.sigma if flow else m.alpha", "m.alpha", GOLDEN.format("flow-heun")),
    ("singlestep.py", "(next_time.sigma > 0) & (s > 0)", "next_time.sigma > 0",
     SAMPLING.format("gradient and heun-zero_snr")),
    ("singlestep.py", "jnp.sqrt(to_mid / to_next) * first", "jnp.sqrt(to_mid / to_next) * second",
     GOLDEN.format("sd1-dpmpp_sde")),
    ("singlestep.py", "to_eps(state.x, next_x0, time)", "to_eps(x, next_x0, time)",
     SCHEDULERS.format("2s_ancestral_is_the_published")),
    ("consistency.py", "return SIGMA_DATA**2 / (scaled", "return 2 * SIGMA_DATA**2 / (scaled",
     GOLDEN.format("distilled-lcm")),
    ("singlestep.py", "up * x + spread", "x + spread", SCHEDULERS.format("tcd")),
    # ---- multistep methods
    ("multistep.py", "(a - other * b) / (node - other)", "(a - other * b) / (other - node)",
     SCHEDULERS.format("published_tables")),
    ("multistep.py", "jnp.maximum(i - k, 0)", "jnp.maximum(i - 1, 0)", GOLDEN.format("order_3-dpmpp_2m")),
    ("multistep.py", "(closed_forms[-1] - 1 / factorial) / large", "(closed_forms[-1] + 1 / factorial) / large",
     SCHEDULERS.format("phi_is_accurate")),
    ("multistep.py", "return jnp.where((r > 0) & (r < 1), jnp.maximum(effective_order, 1), 1)",
     "return jnp.maximum(effective_order, 1)", GOLDEN.format("sd1-dpmpp_2m")),
    ("multistep.py", "jnp.minimum(i + 1, count)", "jnp.minimum(state.steps_taken + 1, count)",
     GOLDEN.format("sd1-lms")),
    ("multistep.py", '0.5 if solver_type == "midpoint" else slope', "slope", GOLDEN.format("sd1-dpmpp_2m")),
    ("multistep.py", "[1.0, slope, phi[2] / phi[0]]", "[1.0, slope, 2 * phi[2] / phi[0]]",
     GOLDEN.format("order_3-dpmpp_2m")),
    ("multistep.py", "-(1 + eta**2) * h", "-h", GOLDEN.format("heun_type-dpmpp_2m_sde")),
    ("multistep.py", "steps < 15)", "steps <= 15)", SCHEDULERS.format("first_order_where_told")),
    ("multistep.py", "order_at(times, previous, state.steps_taken - 1)",
     "order_at(times, previous, state.steps_taken)", GOLDEN.format("sd1-unipc")),
    ("multistep.py", "jnp.isin(i - 1,", "jnp.isin(i,", GOLDEN.format("bh1-unipc")),
    ("multistep.py", "return History(predicted, x0, state.steps_taken + 1, predictions, x)",
     "return History(predicted, x0, state.steps_taken + 1, predictions, state.x)", GOLDEN.format("sd1-unipc")),
    ("multistep.py", "return start - (start > 1) if skip_prk_steps else start", "return start",
     GOLDEN.format("sd1-pndm")),
    ("multistep.py", "[(target_time, query_time, 2.0)", "[(target_time, query_time, 1.0)", GOLDEN.format("prk-pndm")),
    # ---- grids and schedules
    ("times.py", "TCD_GAMMA = 0.3", "TCD_GAMMA = 0.2", SCHEDULERS.format("tcd")),
    ("times.py", 'clean = self.scheduler == "ddim" if', 'clean = self.scheduler != "ddim" if',
     GOLDEN.format("defaults-ddim")),
    ("times.py", "np.log(np.maximum(sigmas, 1e-10)), np.log(self.sigmas)", "np.maximum(sigmas, 1e-10), self.sigmas",
     GOLDEN.format("karras-euler")),
    ("times.py", "steps + 1)[:-1]\n        return t, process", "steps)\n        return t, process",
     GOLDEN.format("log_linear")),
    ("spacing.py", "np.arange(total, 0, -total / steps).round() - 1", "np.arange(total, 0, -total / steps).round()",
     GOLDEN.format("sd1-ddpm")),
    ("spacing.py", "last ** (1 / 7) - first ** (1 / 7))) ** 7", "last ** (1 / 7) - first ** (1 / 7))) ** 6",
     PROPERTIES.format("levels_keep_the_ends")),
    ("spacing.py", "betaincinv(0.6, 0.6, 1 - u)", "betaincinv(0.6, 0.6, u)", PROPERTIES.format("falls_from_noise")),
    ("schedules.py", "(alpha[0] / (alpha[0] - alpha[-1]))", "1.0", PROPERTIES.format("zero_terminal")),
    ("schedules.py", "1 + (shift - 1) * u", "1 + shift * u", PROPERTIES.format("shift_multiplies")),
    ("schedules.py", "jnp.clip(t - low, 0.0, 1.0)", "(t - low)", PROPERTIES.format("at_inter")),
    # ---- predictions, guidance, loss
    ("prediction.py", "(alpha * x - sigma * output) / (alpha**2 + sigma**2)", "alpha * x - sigma * output",
     PROPERTIES.format("inverse")),
    ("prediction.py", "return eps - x0", "return x0 - eps", PROPERTIES.format("velocity_along_the_line")),
    ("guidance.py", "expand(factor, guided) * (ratio - 1)", "expand(factor, guided) * (1 - ratio)",
     GUIDANCE.format("deviation")),
    ("guidance.py", "level <= high", "level < high", GUIDANCE.format("interval")),
    ("diffusion_loss.py", "jnp.minimum(1.0, gamma * noise / signal)", "jnp.minimum(1.0, gamma * signal / noise)",
     PROPERTIES.format("min_snr")),
    ("diffusion_loss.py", "divisor**2", "divisor", PROPERTIES.format("min_snr and exploding")),
    # ---- the loop, blending, options
    ("inpainting.py", "first_call = (i == 0) & (time.t == times.t[0])", "first_call = False",
     GOLDEN.format("sd1-euler")),
    ("sampling_loop.py", "(keys, step + 1)", "(keys, step - step)", SAMPLING.format("keys_are_all")),
    ("sampling_loop.py", "(i >= first) &", "(i > first) &", SAMPLING.format("start_runs and ddim")),
    ("schedulers.py", '"heun": False', '"heun": True', GOLDEN.format("defaults-heun")),
    ("schedulers.py", '{"flow": is_flow(config)}', "{}", GOLDEN.format("flow-heun")),
)  # fmt: skip

# What the tests of the other folders are called below.
PROMPTS = "tests/test_prompts.py -k '{}'"
TILING = "tests/test_tiling.py -k '{}'"
NETWORKS = "tests/test_models.py -k 'golden and {}'"

SAMPLES = in_folder(
    "jaxdiff/sampling",
    ("inputs.py", "jnp.sin(fraction * angle) / sine", "fraction", "tests/test_variations.py -k slerp"),
    ("resolve.py", "np.linspace(0 if first is None else int(first), last, frames)", "np.linspace(0, last, frames)",
     "tests/test_resolve.py -k left_open"),
    ("denoiser.py", "(batch,)) - 1)", "(batch,)))", "tests/test_tasks.py -k guidance_embedding"),
)  # fmt: skip

MODELS = in_folder(
    "jaxdiff/models",
    ("tiling.py", "*= 1 - ramp", "*= ramp", TILING.format("seam")),
    ("tiling.py", "gaps = -(-room // (tile - overlap))", "gaps = room // (tile - overlap)", TILING.format("cover_all")),
    ("layers.py", "(half - freq_shift)", "half", NETWORKS.format("distilled")),
    ("layers.py", "jax.nn.sigmoid(1.702 * x)", "jax.nn.sigmoid(1.5 * x)", NETWORKS.format("vit_l")),
)

TRANSFORMERS = in_folder(
    "jaxdiff/models",
    ("dit.py", "layer_norm(x) * (1 + scale) + shift", "layer_norm(x) * scale + shift",
     "tests/test_transformers.py -k sd3"),
    ("dit.py", "(0, 1, 3, 5, 2, 4) if channels_first", "(0, 1, 3, 5, 4, 2) if channels_first",
     "tests/test_transformers.py -k unfold"),
    ("t5.py", "half * (distance > 0)", "half * (distance >= 0)", "tests/test_transformers.py -k t5"),
    ("qwen3.py", "is_causal=True", "is_causal=False", "tests/test_transformers.py -k qwen3"),
)  # fmt: skip

IO = in_folder(
    "jaxdiff/io",
    ("edges.py", "(i % 2 == 0)", "(i % 2 == 1)", "tests/test_edges.py -k opencv"),
    ("torch_names.py", "x.transpose(2, 3, 1, 0)", "x.transpose(3, 2, 1, 0)",
     "tests/test_single_file.py -k 'comes_back and sd1'"),
    ("original_layout.py", '"qkv".index', '"kqv".index', "tests/test_single_file_oracle.py -k 'openclip and sd2'"),
    ("lora.py", "(change.alpha / change.rank) *", "change.alpha *", "tests/test_lora.py -k locon"),
    ("lora_config.py", "value * math.sqrt(rank)", "value", "tests/test_lora_files.py -k 'strength and folder'"),
    ("pickles.py", "isinstance(machine.stack[-1], _Parameters) and", "False and",
     "tests/test_textual_inversion.py -k first_trainers"),
    ("images.py", "(n + SEAM * (n > 0) for", "(n + SEAM for", "jaxdiff/io/images.py"),
)  # fmt: skip

TEXT = in_folder(
    "jaxdiff/text",
    ("chunks.py", "next((i + 1 for i in candidates", "next((i for i in candidates",
     PROMPTS.format("cut_after_a_comma")),
    ("chunks.py", "np.arange(count) < num_chunks[:, None]", "np.arange(count) <= num_chunks[:, None]",
     PROMPTS.format("its_own_chunks")),
    ("emphasis.py", '(start, None, _STEP if mark == "(" else 1 / _STEP)', "(start, None, _STEP)",
     PROMPTS.format("test_emphasis")),
    ("tokenizer.py", "[*tokens[: self.max_length - 1], self.eos_id]", "tokens[: self.max_length]",
     "tests/test_tokenizer.py -k equals_transformers"),
    ("wildcards.py", "return math.prod(sum(", "return sum(sum(", "tests/test_prompt_files.py -k cannot_be_expanded"),
)  # fmt: skip

# What the tests of training and of its data are called below.
STEPS = "tests/test_training.py -k '{}'"
LOOP = "tests/test_training_loop.py -k '{}'"
OPTIMIZERS = "tests/test_optimizers.py -k '{}'"
TARGETS = "tests/test_finetune.py -k '{}'"
SETTINGS = "tests/test_train_settings.py -k '{}'"
MESHES = "tests/test_parallel.py -k '{}'"
TRUST = "tests/test_trust.py -k '{}'"
FILTERS = "tests/test_filters.py -k '{}'"
BUCKETS = "tests/test_buckets.py -k '{}'"
SOURCES = "tests/test_sources.py -k '{}'"

TRAINING = in_folder(
    "jaxdiff/training",
    # ---- a step
    ("train_step.py", "(1.0 + step) / (10.0 + step)", "1.0 / (10.0 + step)", STEPS.format("ema_forgets")),
    ("train_step.py", "jnp.where(finite, new, old)", "new", LOOP.format("leaves_the_state")),
    ("train_step.py", "lambda x: x / microbatches, total", "lambda x: x, total", STEPS.format("a_batch_in_parts")),
    ("losses.py", "jnp.where(same_caption & ~diagonal, -jnp.inf,", "jnp.where(False, -jnp.inf,",
     STEPS.format("equal_captions")),
    ("losses.py", "return total / scales", "return total", STEPS.format("tone_and_edges")),
    ("stages.py", "jnp.where(drop[:, None], empty[name], batch[name])", "batch[name]",
     STEPS.format("dropping_every_caption")),
    ("stages.py", '(errors * batch.get("weight", 1.0)).mean()', "errors.mean()",
     SETTINGS.format("weigh_what_is_asked")),
    ("optimizer.py", "jnp.minimum(1.0, max_norm / optax.tree.norm(updates))", "max_norm / optax.tree.norm(updates)",
     OPTIMIZERS.format("clipping")),
    # ---- against a discriminator, and into few steps
    ("adversarial.py", "(gradient**2).sum((1, 2, 3)).mean() / 2", "(gradient**2).sum((1, 2, 3)).mean()",
     "tests/test_adversarial.py -k penalties"),
    ("adversarial.py", "discriminator += rules.r2 *", "discriminator += rules.r1 *",
     "tests/test_adversarial.py -k finite_differences"),
    ("adversarial.py", "first_norm / (second_norm + NORM_EPS)", "second_norm / (first_norm + NORM_EPS)",
     "tests/test_adversarial.py -k adaptive_weight"),
    # ---- what is trained, and on what
    ("finetune.py", "mask | (jax.random.uniform(key_whole, (), jnp.float32) < FULL_MASK_SHARE)", "mask",
     TARGETS.format("masks_are")),
    ("trainables.py", "rescale_betas_zero_snr=True, ", "", TARGETS.format("zero_terminal")),
    ("dreambooth.py", "self.prior[batch * num_prior + row - num_subject]", "self.prior[batch * num_prior + row]",
     SETTINGS.format("any_number_of_hosts")),
    # ---- runs
    ("loop.py", "        iterator.set_state(position)\n", "", LOOP.format("resumed_run_equals")),
    ("digests.py", "if expected.get(name) != actual[name]:", "if name not in expected:",
     TRUST.format("damage_of_any and flipped")),
    ("collectives.py", "visit(callee, runs * trip_count)", "visit(callee, runs)",
     MESHES.format("collectives_are_counted")),
) + in_folder(
    "jaxdiff",
    ("parallel.py", "max(candidates, key=lambda i: shape[i])", "min(candidates, key=lambda i: shape[i])",
     MESHES.format("largest_divisible")),
    ("cli/requests.py", "(num_batches(n), n)", "(num_batches(n), -n)", "tests/test_batch_sizes.py -k equal"),
    ("cli/requests.py", "(1 - MAX_PADDING) * n * num_batches(n) <= num_batches(1)", "True",
     "tests/test_batch_sizes.py -k nearly_full"),
)  # fmt: skip

DATA = in_folder(
    "jaxdiff/data",
    ("hashes.py", "small[:, 1:] > small[:, :-1]", "small[:, 1:] >= small[:, :-1]", FILTERS.format("plain_images")),
    ("hashes.py", " + BEYOND_WHITE * (1 - alpha)", "", FILTERS.format("transparent_drawings")),
    ("hashes.py", "distance + 2).astype(int)", "distance + 1).astype(int)", FILTERS.format("no_near_duplicate")),
    ("buckets.py", "(aspects[order][1:] + aspects[order][:-1]) / 2", "aspects[order][1:]",
     BUCKETS.format("nearest_aspect")),
    ("orders.py", "block_order[host_shard::host_shards]", "block_order[host_shard:]",
     SOURCES.format("read_by_one_host")),
)  # fmt: skip

SERVING = in_folder(
    "jaxdiff/serving",
    ("engine.py", "if item.key == first.key]", "if True]", "tests/test_serve_engine.py -k drawn_at_once"),
    ("guard.py", "urlsplit(origin).netloc != host", "False", "tests/test_serve_hostile.py -k other_sites"),
    ("guard.py", "path not in PUBLIC_PATHS", "path in PUBLIC_PATHS", "tests/test_serve_hostile.py -k the_key"),
)  # fmt: skip

MUTATIONS = [*DIFFUSION, *SAMPLES, *MODELS, *TRANSFORMERS, *IO, *TEXT, *TRAINING, *DATA, *SERVING]


def stale(mutation: Mutation) -> bool:
    """Whether the code that a mutation changes is not there, or is there more than once."""
    return (ROOT / mutation.file).read_text().count(mutation.old) != 1


def copy(to: Path) -> None:
    """The code and its tests, without what git ignores: nothing is written into the checkout."""
    for path in ROOT.iterdir():
        if path.name in COPIED:
            shutil.copytree(path, to / path.name, ignore=shutil.ignore_patterns("__pycache__"))
        elif path.is_file() and path.name != ".git":  # what a worktree has in place of the folder
            shutil.copy2(path, to / path.name)


def outcome(root: Path, tests: str) -> str:
    """PASSED, FAILED, or what else the tests end in."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *shlex.split(tests)]
    env = {**os.environ, "PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return "FAILED"
    last = (done.stdout.strip().splitlines() or done.stderr.strip().splitlines() or [""])[-1]
    return {0: "PASSED", 1: "FAILED"}.get(done.returncode, f"pytest ended with {done.returncode}: {last}")


def verdict(root: Path, mutation: Mutation) -> str:
    path = root / mutation.file
    text = path.read_text()
    path.write_text(text.replace(mutation.old, mutation.new))
    try:
        ended = outcome(root, mutation.tests)
    finally:
        path.write_text(text)
    return {"PASSED": "SURVIVED", "FAILED": "CAUGHT"}.get(ended, f"BROKEN ({ended})")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="take those whose file, lines or tests contain one of these")
    parser.add_argument("--check", action="store_true", help="run nothing: say which no longer apply")
    options = parser.parse_args()
    chosen = [m for m in MUTATIONS if not options.words or any(w in " ".join(m) for w in options.words)]
    old = [m for m in chosen if stale(m)]
    for mutation in old:
        print(f"STALE     {mutation.file}: {mutation.old!r}")
    if options.check or old:
        print(f"{len(chosen) - len(old)} of {len(chosen)} apply.")
        return int(bool(old))
    caught, sound = 0, {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        copy(root)
        for mutation in chosen:
            if mutation.tests not in sound:
                sound[mutation.tests] = outcome(root, mutation.tests)
            passes = sound[mutation.tests] == "PASSED"
            found = verdict(root, mutation) if passes else f"BROKEN (without it: {sound[mutation.tests]})"
            caught += found == "CAUGHT"
            print(f"{found:9} {mutation.file}: {mutation.old!r} -> {mutation.new!r}", flush=True)
    print(f"{caught} of {len(chosen)} caught.")
    return int(caught < len(chosen))


if __name__ == "__main__":
    sys.exit(main())
