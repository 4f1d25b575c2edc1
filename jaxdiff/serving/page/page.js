// The page asks the server's own APIs: OpenAI's endpoints for images, AUTOMATIC1111's for progress, enlarging and a
// PNG's settings.

import { $, ask, dataUrl, lost, option, post, say, unavailable } from "./common.js";
import { clearPreviews, keep, place, preview } from "./gallery.js";
import { addControls, addSource, controlFiles, controlImages, hasSource, outpaints, setSource } from "./images.js";

const PARTIAL_IMAGES = 3;
const SEEDS = 4294967296;
let can = {}; // what the model and the server can do
let working = null; // the AbortController of a request under way
let lastSeed = null;

async function start() {
  can = await (await ask("page/page.json")).json();
  for (const size of can.sizes) option($("size"), size, size.replace("x", " × "));
  for (const name of can.schedulers) option($("scheduler"), name);
  for (const name of can.styles) option($("style"), name);
  for (const name of can.loras) option($("lora"), name);
  for (const scale of [2, 3, 4]) option($("scale"), scale, `${scale} ×`);
  $("scale").value = Math.min(4, can.upscaler_scale) || 2;
  $("scheduler").value = can.scheduler;
  $("steps").value = can.steps;
  $("steps").max = can.max_steps;
  $("n").max = can.max_images;
  $("guidance_scale").value = can.guidance_scale;
  $("pag_scale").value = can.pag_scale || 0;
  addControls(can.controlnets);
  greyOut();
  if (can.needs_mask) {
    $("image_part").open = true;
    say("This model is for inpainting: choose an image and paint over what is to be redrawn, or outpaint it.");
  }
  $("model").textContent = can.model;
}

// What the model or the server cannot do.
function greyOut() {
  if (!can.negative_prompt) unavailable("This model was distilled to do without.", $("negative_prompt"));
  if (!can.guidance) unavailable("This model was distilled with one.", $("guidance_scale"));
  if (can.pag_scale === null) unavailable("It is for models with a UNet that draws step by step.", $("pag_scale"));
  if (!can.loras.length) unavailable("The server was started without --lora_dir.", $("lora"), $("lora_weight"), $("add_lora"));
  if (!can.controlnets) unavailable("The server was started without --controlnet.", $("control_part"));
  if (can.upscaler_scale < 2) {
    unavailable(can.upscaler ? "The server's network does not enlarge." : "The server was started without an upscaler.", $("upscale_part"));
  }
  if (can.max_images < 2) unavailable("The server draws one image at a time.", $("matrix"), $("n"));
}

// --- drawing

async function fields() {
  const given = {
    prompt: $("prompt").value,
    n: Number($("n").value),
    size: outpaints() ? "auto" : $("size").value,
    steps: Number($("steps").value),
    guidance_scale: Number($("guidance_scale").value),
    scheduler: $("scheduler").value,
    seed: $("seed").value === "" ? Math.floor(Math.random() * SEEDS) : Number($("seed").value),
    stream: true,
    partial_images: PARTIAL_IMAGES,
  };
  if ($("negative_prompt").value && can.negative_prompt) given.negative_prompt = $("negative_prompt").value;
  if (can.pag_scale !== null) given.pag_scale = Number($("pag_scale").value);
  if ($("style").value) given.style = $("style").value;
  if ($("matrix").checked) given.matrix = true;
  if (controlFiles().length) {
    given.controlnet_scale = Number($("controlnet_scale").value);
    given.control_edges = $("control_edges").checked;
  }
  return given;
}

async function request(given, signal) {
  if (!hasSource()) {
    const body = controlFiles().length ? { ...given, control_images: await controlImages() } : given;
    return post("v1/images/generations", body, signal);
  }
  const form = new FormData();
  for (const [name, value] of Object.entries(given)) form.append(name, value);
  await addSource(form);
  for (const file of controlFiles()) form.append("control_image", file);
  return ask("v1/images/edits", { method: "POST", body: form, signal });
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read().catch(lost);
    if (done) return;
    text += value;
    const parts = text.split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      const data = part.split("\n").find((line) => line.startsWith("data: "));
      if (data) yield JSON.parse(data.slice(6));
    }
  }
}

// Do one thing at a time, which Cancel ends; `work` takes the signal and returns what to say at the end, and `watch`
// says how far it is.
async function busy(text, work, watch = () => {}) {
  if (working) return;
  working = new AbortController();
  const timer = setInterval(watch, 500);
  const focused = document.activeElement;
  $("progress").removeAttribute("value");
  showBusy();
  say(text);
  try {
    say(await work(working.signal));
  } catch (error) {
    if (error.name === "AbortError") say("Cancelled.");
    else say(error.message, true);
  } finally {
    clearPreviews();
    clearInterval(timer);
    working = null;
    showBusy();
    if (document.activeElement === document.body) focused.focus({ preventScroll: true }); // which greying out took away
  }
}

// Grey out what cannot begin now.
function showBusy() {
  const beginning = document.querySelectorAll("#draw, #upscale_image:not([aria-describedby]), #gallery .upscale");
  for (const button of beginning) button.disabled = working !== null;
  $("cancel").disabled = working === null;
  $("progress").hidden = working === null;
}

async function draw(signal) {
  const given = await fields();
  const before = place();
  const response = await request(given, signal);
  let finished = 0;
  for await (const event of events(response)) {
    if (event.error) throw new Error(event.error.message);
    const address = `data:image/${event.output_format};base64,${event.b64_json}`;
    if (event.type.endsWith("partial_image")) preview(event.image_index, address);
    else {
      clearPreviews();
      keepDrawn(address, before, given, event);
      finished += 1;
    }
  }
  lastSeed = given.seed;
  $("reuse").disabled = false;
  return finished === 1 ? "One image is drawn." : `${finished} images are drawn.`;
}

async function progress() {
  try {
    const found = await (await fetch("sdapi/v1/progress?skip_current_image=true")).json();
    if (!working || !found.state.sampling_steps) return;
    $("progress").value = found.progress;
    const left = found.eta_relative ? `, about ${Math.ceil(found.eta_relative)} s left` : "";
    say(`Drawing: ${Math.round(100 * found.progress)} %${left}`);
  } catch { /* the next one may come */ }
}

function keepDrawn(address, before, given, event) {
  const own = { ...given, seed: event.seed, size: event.size };
  if (event.revised_prompt) { // of a matrix, and in its style already
    own.prompt = event.revised_prompt;
    delete own.style;
    delete own.matrix;
  }
  const about = [`seed ${own.seed}`, `${own.steps} steps`, `guidance ${own.guidance_scale}`, own.scheduler, own.size];
  const shown = `${own.prompt} (${about.join(", ")})`;
  keepImage(address, before, shown, `${own.prompt.slice(0, 40)}-${own.seed}`, { again: () => use(own) });
}

function keepImage(address, before, shown, name, more = {}) {
  const actions = { ...more, redraw: setSource };
  if (can.upscaler_scale >= 2) actions.upscale = (image) => busy("Upscaling …", (signal) => upscale(image.src, shown, signal, more));
  keep(address, before, shown, name, actions);
  showBusy();
}

async function upscale(image, shown, signal, more = {}) {
  const scale = Number($("scale").value);
  const before = place();
  const body = { image, upscaling_resize: scale, upscaler_1: can.upscaler };
  const found = await (await post("sdapi/v1/extra-single-image", body, signal)).json();
  const address = `data:image/png;base64,${found.image}`;
  keepImage(address, before, `${shown}, upscaled ${scale} ×`, `${shown.slice(0, 40)}-x${scale}`, more);
  return "One image is upscaled.";
}

// --- settings

function use(flags) {
  for (const name of ["prompt", "negative_prompt", "steps", "guidance_scale", "pag_scale", "seed", "strength"]) {
    if (flags[name] === undefined || $(name).disabled) continue;
    $(name).value = flags[name];
    between($(name));
  }
  if (flags.negative_prompt === undefined) $("negative_prompt").value = "";
  if (flags.pag_scale === undefined) $("pag_scale").value = 0;
  const unknown = [];
  const size = flags.size || (flags.width ? `${flags.width}x${flags.height}` : "");
  for (const [name, value] of [["size", size], ["scheduler", flags.scheduler]]) {
    if (!value) continue;
    if ([...$(name).options].some((o) => o.value === value)) $(name).value = value;
    else unknown.push(`${name} ${value}`);
  }
  $("style").value = flags.style || "";
  $("matrix").checked = false;
  $("n").value = 1;
  say(unknown.length ? `The settings are back, but for ${unknown.join(", ")}, which is not here.` : "The settings are back.");
}

// The steps of the arrow keys are no limits: a number between them is allowed.
function between(input) {
  if (input.validity.stepMismatch && input.step.includes(".")) input.step = "any";
}

async function settingsOf(file) {
  try {
    const found = await (await post("sdapi/v1/png-info", { image: await dataUrl(file) })).json();
    if (!found.parameters.prompt) throw new Error("This file does not say how it was drawn.");
    use(found.parameters);
  } catch (error) {
    say(error.message, true);
  }
}

$("form").addEventListener("submit", (event) => { event.preventDefault(); busy("Waiting for the server …", draw, progress); });
$("form").addEventListener("input", (event) => between(event.target));
$("form").addEventListener("invalid", (event) => { // so that the browser can show what is wrong
  const part = event.target.closest("details");
  if (part) part.open = true;
}, true);
$("cancel").addEventListener("click", () => working && working.abort());
$("random").addEventListener("click", () => { $("seed").value = ""; });
$("reuse").addEventListener("click", () => { $("seed").value = lastSeed; });
$("add_lora").addEventListener("click", () => {
  $("prompt").value += ` <lora:${$("lora").value}:${$("lora_weight").value || 1}>`;
});
$("upscale_image").addEventListener("change", () => {
  const file = $("upscale_image").files[0];
  if (file) busy("Upscaling …", async (signal) => upscale(await dataUrl(file), file.name, signal));
});
$("settings").addEventListener("change", () => $("settings").files[0] && settingsOf($("settings").files[0]));
for (const id of ["image", "settings", "upscale_image"]) { // so that the same file may be chosen again
  $(id).addEventListener("click", () => { $(id).value = ""; });
}
// A file may be dropped anywhere, but another input's is its own; so is dropped text.
for (const kind of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    const own = event.target.closest("input[type=file]:enabled:not(#settings)");
    if (own || !event.dataTransfer.types.includes("Files")) return;
    event.preventDefault();
    $("drop").classList.toggle("over", kind === "dragover");
    if (kind === "drop" && event.dataTransfer.files[0]) settingsOf(event.dataTransfer.files[0]);
  });
}
start().catch((error) => say(error.message, true));
