"use strict";
// The page asks the server's own APIs: OpenAI's endpoints for images, AUTOMATIC1111's for progress and a PNG's settings.

const $ = (id) => document.getElementById(id);
const PARTIAL_IMAGES = 3;
const MANY_IMAGES = 40; // that the gallery keeps
let can = {}; // what the model and the server can do
let drawing = null; // the AbortController of a request under way
let lastSeed = null;
let source = null; // the image to start from, a canvas at its own size
let mask = null; // what is painted over it, a canvas of that size
let painted = false;

function say(text, isError = false) {
  $("status").textContent = text;
  $("status").classList.toggle("error", isError);
}

function option(select, value, text = value) {
  const made = document.createElement("option");
  made.value = value;
  made.textContent = text;
  select.append(made);
}

function unavailable(element, why) {
  for (const part of element.matches("input, select, textarea, button") ? [element] : element.querySelectorAll("input, select, textarea, button")) {
    part.disabled = true;
    part.title = why;
  }
  element.title = why;
}

async function start() {
  const answer = await fetch("page/page.json");
  if (!answer.ok) throw new Error(`The server answers ${answer.status}.`);
  can = await answer.json();
  $("model").textContent = can.model;
  for (const size of can.sizes) option($("size"), size, size.replace("x", " × "));
  for (const name of can.schedulers) option($("scheduler"), name);
  for (const name of can.styles) option($("style"), name);
  for (const name of can.loras) option($("lora"), name);
  $("scheduler").value = can.scheduler;
  $("steps").value = can.steps;
  $("steps").max = can.max_steps;
  $("n").max = can.max_images;
  $("guidance_scale").value = can.guidance_scale;
  if (!can.negative_prompt) unavailable($("negative_prompt"), "This model was distilled to do without.");
  if (!can.guidance) unavailable($("guidance_scale"), "This model was distilled with one.");
  if (!can.loras.length) {
    unavailable($("lora"), "The server was started without --lora_dir.");
    unavailable($("lora_weight"), "The server was started without --lora_dir.");
  }
  if (can.needs_mask) {
    $("image_part").open = true;
    say("This model is for inpainting: choose an image and paint over what is to be redrawn.");
  }
}

// --- drawing

function fields() {
  let prompt = $("prompt").value;
  if ($("lora").value) prompt += ` <lora:${$("lora").value}:${$("lora_weight").value || 1}>`;
  const given = {
    prompt,
    n: Number($("n").value),
    size: $("size").value,
    steps: Number($("steps").value),
    guidance_scale: Number($("guidance_scale").value),
    scheduler: $("scheduler").value,
    seed: $("seed").value === "" ? Math.floor(Math.random() * 4294967296) : Number($("seed").value),
    stream: true,
    partial_images: PARTIAL_IMAGES,
  };
  if ($("negative_prompt").value && can.negative_prompt) given.negative_prompt = $("negative_prompt").value;
  if ($("style").value) given.style = $("style").value;
  return given;
}

function blob(canvas) {
  return new Promise((done) => canvas.toBlob(done, "image/png"));
}

async function request(given, signal) {
  if (!source) {
    const body = JSON.stringify(given);
    return fetch("v1/images/generations", { method: "POST", headers: { "Content-Type": "application/json" }, body, signal });
  }
  const form = new FormData();
  for (const [name, value] of Object.entries(given)) form.append(name, value);
  form.append("strength", $("strength").value);
  form.append("image", await blob(source), "image.png");
  if (painted) form.append("mask", await blob(transparentMask()), "mask.png");
  return fetch("v1/images/edits", { method: "POST", body: form, signal });
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
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

async function draw() {
  const given = fields();
  drawing = new AbortController();
  $("draw").disabled = true;
  $("cancel").disabled = false;
  $("progress").hidden = false;
  $("progress").removeAttribute("value");
  $("previews").replaceChildren();
  say("Waiting for the server …");
  const timer = setInterval(progress, 500);
  let finished = 0;
  try {
    const response = await request(given, drawing.signal);
    if (!response.ok) throw new Error((await response.json()).error.message);
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      const address = `data:image/${event.output_format};base64,${event.b64_json}`;
      if (event.type.endsWith("partial_image")) preview(event.image_index, address);
      else {
        if (!finished) $("previews").replaceChildren();
        keep(address, { ...given, seed: (given.seed + event.image_index) % 4294967296 });
        finished += 1;
      }
    }
    lastSeed = given.seed;
    $("reuse").disabled = false;
    say(finished === 1 ? "One image is drawn." : `${finished} images are drawn.`);
  } catch (error) {
    $("previews").replaceChildren();
    if (error.name === "AbortError") say("Cancelled.");
    else say(error.message, true);
  } finally {
    clearInterval(timer);
    drawing = null;
    $("draw").disabled = false;
    $("cancel").disabled = true;
    $("progress").hidden = true;
  }
}

async function progress() {
  try {
    const found = await (await fetch("sdapi/v1/progress?skip_current_image=true")).json();
    if (!drawing || !found.state.job_count) return;
    $("progress").value = found.progress;
    const left = found.eta_relative ? `, about ${Math.ceil(found.eta_relative)} s left` : "";
    say(`Drawing: ${Math.round(100 * found.progress)} %${left}`);
  } catch { /* the next one may come */ }
}

function preview(index, address) {
  let image = $("previews").querySelector(`[data-index="${index}"]`);
  if (!image) {
    image = document.createElement("img");
    image.dataset.index = index;
    image.alt = `Image ${index + 1}, being drawn`;
    $("previews").append(image);
  }
  image.src = address;
}

function keep(address, given) {
  const item = $("item").content.cloneNode(true).firstElementChild;
  const image = item.querySelector("img");
  image.src = address;
  image.alt = given.prompt;
  const shown = [`seed ${given.seed}`, `${given.steps} steps`, `guidance ${given.guidance_scale}`, given.scheduler, given.size];
  item.querySelector("figcaption").textContent = `${given.prompt} (${shown.join(", ")})`;
  const link = item.querySelector(".download");
  link.href = address;
  link.download = `${given.prompt.replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 50) || "image"}-${given.seed}.png`;
  item.querySelector(".redraw").addEventListener("click", () => { setSource(image); $("image_part").open = true; });
  item.querySelector(".again").addEventListener("click", () => use(given));
  $("gallery").prepend(item);
  while ($("gallery").children.length > MANY_IMAGES) $("gallery").lastElementChild.remove();
}

// --- settings

function use(flags) {
  for (const name of ["prompt", "negative_prompt", "steps", "guidance_scale", "seed", "strength"]) {
    if (flags[name] !== undefined && !$(name).disabled) $(name).value = flags[name];
  }
  if (flags.negative_prompt === undefined) $("negative_prompt").value = "";
  const unknown = [];
  const size = flags.size || (flags.width ? `${flags.width}x${flags.height}` : "");
  for (const [name, value] of [["size", size], ["scheduler", flags.scheduler]]) {
    if (!value) continue;
    if ([...$(name).options].some((o) => o.value === value)) $(name).value = value;
    else unknown.push(`${name} ${value}`);
  }
  $("style").value = flags.style || "";
  $("lora").value = "";
  $("n").value = 1;
  say(unknown.length ? `The settings are back, but for ${unknown.join(", ")}, which is not here.` : "The settings are back.");
}

async function settingsOf(file) {
  try {
    const image = await new Promise((done, failed) => {
      const reader = new FileReader();
      reader.onload = () => done(reader.result);
      reader.onerror = () => failed(new Error("The file cannot be read."));
      reader.readAsDataURL(file);
    });
    const body = JSON.stringify({ image });
    const response = await fetch("sdapi/v1/png-info", { method: "POST", headers: { "Content-Type": "application/json" }, body });
    const found = await response.json();
    if (!response.ok) throw new Error(found.detail);
    if (!found.parameters.prompt) throw new Error("This file does not say how it was drawn.");
    use(found.parameters);
  } catch (error) {
    say(error.message, true);
  }
}

// --- an image and its mask

function canvasOf(width, height) {
  const made = document.createElement("canvas");
  made.width = width;
  made.height = height;
  return made;
}

function setSource(image) {
  source = canvasOf(image.naturalWidth, image.naturalHeight);
  source.getContext("2d").drawImage(image, 0, 0);
  mask = canvasOf(source.width, source.height);
  painted = false;
  $("canvas").width = source.width;
  $("canvas").height = source.height;
  $("canvas").hidden = false;
  show();
  say("The next images start from this one.");
}

function show() {
  const context = $("canvas").getContext("2d");
  context.clearRect(0, 0, source.width, source.height);
  context.drawImage(source, 0, 0);
  context.globalAlpha = 0.6;
  context.drawImage(mask, 0, 0);
  context.globalAlpha = 1;
}

function transparentMask() {
  const made = canvasOf(mask.width, mask.height);
  const context = made.getContext("2d");
  context.fillRect(0, 0, made.width, made.height);
  context.globalCompositeOperation = "destination-out";
  context.drawImage(mask, 0, 0);
  return made;
}

function paint(event) {
  if (!source || !(event.buttons & 1)) return;
  const box = $("canvas").getBoundingClientRect();
  const scale = source.width / box.width;
  const context = mask.getContext("2d");
  const x = (event.clientX - box.left) * scale;
  const y = (event.clientY - box.top) * scale;
  context.fillStyle = "rgb(230, 0, 120)";
  context.beginPath();
  context.arc(x, y, (Number($("brush").value) / 100) * source.width / 2, 0, 2 * Math.PI);
  context.fill();
  painted = true;
  show();
}

function removeSource() {
  source = mask = null;
  painted = false;
  $("canvas").hidden = true;
  $("image").value = "";
  say("The next images are drawn from text alone.");
}

function chosen(file) {
  const image = new Image();
  image.onload = () => { setSource(image); URL.revokeObjectURL(image.src); };
  image.onerror = () => say("The file is no image that the browser can show.", true);
  image.src = URL.createObjectURL(file);
}

$("form").addEventListener("submit", (event) => { event.preventDefault(); if (!drawing) draw(); });
$("cancel").addEventListener("click", () => drawing && drawing.abort());
$("reuse").addEventListener("click", () => { $("seed").value = lastSeed; });
$("image").addEventListener("change", () => $("image").files[0] && chosen($("image").files[0]));
$("settings").addEventListener("change", () => $("settings").files[0] && settingsOf($("settings").files[0]));
$("clear_image").addEventListener("click", removeSource);
$("clear_mask").addEventListener("click", () => {
  if (!source) return;
  mask.getContext("2d").clearRect(0, 0, mask.width, mask.height);
  painted = false;
  show();
});
$("mask_part").addEventListener("change", () => {
  const part = { left: [0, 0, 0.5, 1], right: [0.5, 0, 0.5, 1], upper: [0, 0, 1, 0.5], lower: [0, 0.5, 1, 0.5], centre: [0.25, 0.25, 0.5, 0.5] }[$("mask_part").value];
  $("mask_part").value = "";
  if (!source || !part) return;
  const context = mask.getContext("2d");
  context.fillStyle = "rgb(230, 0, 120)";
  context.fillRect(part[0] * mask.width, part[1] * mask.height, part[2] * mask.width, part[3] * mask.height);
  painted = true;
  show();
});
for (const kind of ["pointerdown", "pointermove"]) $("canvas").addEventListener(kind, paint);
for (const kind of ["dragover", "dragleave", "drop"]) {
  $("drop").addEventListener(kind, (event) => {
    event.preventDefault();
    $("drop").classList.toggle("over", kind === "dragover");
    if (kind === "drop" && event.dataTransfer.files[0]) settingsOf(event.dataTransfer.files[0]);
  });
}
start().catch((error) => say(error.message, true));
