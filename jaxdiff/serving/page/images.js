// The image to start from with its mask and margins, and the images that ControlNets follow.

import { $, blob, canvasOf, dataUrl, say } from "./common.js";

const PAINT = "rgb(230, 0, 120)";
const PARTS = { left: [0, 0, 0.5, 1], right: [0.5, 0, 0.5, 1], upper: [0, 0, 1, 0.5], lower: [0, 0.5, 1, 0.5], centre: [0.25, 0.25, 0.5, 0.5] };
const SIDES = ["left", "top", "right", "bottom"];
let source = null; // the image to start from, a canvas at its own size
let mask = null; // what is painted over it, a canvas of that size
let painted = false;
let brush = null; // where it is on the image while it paints

export function hasSource() {
  return source !== null;
}

// Whether something is added at a side of the image.
export function outpaints() {
  return source !== null && margins().some((added) => added > 0);
}

// The fields of an edit.
export async function addSource(form) {
  form.append("strength", $("strength").value);
  form.append("image", await blob(source), "image.png");
  if (painted) form.append("mask", await blob(transparentMask()), "mask.png");
  if (outpaints()) {
    form.set("strength", 1); // what is added has nothing to start from
    form.append("outpaint", margins().join());
  }
}

export function controlFiles() {
  return [...document.querySelectorAll("#controls input")].flatMap((input) => [...input.files]);
}

export function controlImages() {
  return Promise.all(controlFiles().map(dataUrl));
}

// A file's input for each ControlNet.
export function addControls(count) {
  for (let i = 0; i < Math.max(1, count); i += 1) {
    const label = document.createElement("label");
    const input = document.createElement("input");
    input.type = "file";
    input.accept = "image/png,image/jpeg,image/webp";
    input.id = `control_${i}`;
    label.append(count > 1 ? `Image for ControlNet ${i + 1}` : "Image that it follows", input);
    $("controls").append(label);
  }
}

function margins() {
  return SIDES.map((side) => Math.max(0, Math.round(Number($(side).value)) || 0));
}

export function setSource(image) {
  source = canvasOf(image.naturalWidth, image.naturalHeight);
  source.getContext("2d").drawImage(image, 0, 0);
  mask = canvasOf(source.width, source.height);
  painted = false;
  $("canvas").hidden = false;
  show();
  $("image_part").open = true;
  say("The next images start from this one.");
}

// A mask and margins both say what is drawn: one greys the other out.
function exclude() {
  for (const id of ["strength", "mask_part", "brush"]) $(id).disabled = outpaints();
  for (const side of SIDES) $(side).disabled = painted;
  $("no_mask").hidden = !outpaints();
  $("no_margins").hidden = !painted;
}

// The image with what is painted over it, and margins in the colour of paint.
function show() {
  exclude();
  if (!source) return;
  const [left, top, right, bottom] = margins();
  const [width, height] = [left + source.width + right, top + source.height + bottom];
  $("canvas").width = width;
  $("canvas").height = height;
  const context = $("canvas").getContext("2d");
  context.globalAlpha = 0.6;
  context.fillStyle = PAINT;
  context.fillRect(0, 0, width, height);
  context.globalAlpha = 1;
  context.clearRect(left, top, source.width, source.height);
  context.drawImage(source, left, top);
  context.globalAlpha = 0.6;
  context.drawImage(mask, left, top);
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
  if (!source || outpaints() || !(event.buttons & 1)) return;
  const box = $("canvas").getBoundingClientRect();
  const scale = source.width / box.width;
  const here = [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale];
  if (event.type === "pointerdown") {
    $("canvas").setPointerCapture(event.pointerId);
    brush = here;
  }
  if (!brush) return;
  const context = mask.getContext("2d");
  context.strokeStyle = PAINT;
  context.lineWidth = (Number($("brush").value) / 100) * source.width;
  context.lineCap = "round";
  context.beginPath();
  context.moveTo(...brush);
  context.lineTo(...here);
  context.stroke();
  brush = here;
  painted = true;
  show();
}

function paintPart() {
  const part = PARTS[$("mask_part").value];
  $("mask_part").value = "";
  if (!source || !part) return;
  const context = mask.getContext("2d");
  context.fillStyle = PAINT;
  context.fillRect(part[0] * mask.width, part[1] * mask.height, part[2] * mask.width, part[3] * mask.height);
  painted = true;
  show();
}

function clearMask() {
  if (!source) return;
  mask.getContext("2d").clearRect(0, 0, mask.width, mask.height);
  painted = false;
  show();
}

function removeSource() {
  source = mask = null;
  painted = false;
  $("canvas").hidden = true;
  $("image").value = "";
  exclude();
  say("The next images are drawn from text alone.");
}

function chosen(file) {
  const image = new Image();
  image.onload = () => { setSource(image); URL.revokeObjectURL(image.src); };
  image.onerror = () => say("The file is no image that the browser can show.", true);
  image.src = URL.createObjectURL(file);
}

$("image").addEventListener("change", () => $("image").files[0] && chosen($("image").files[0]));
$("clear_image").addEventListener("click", removeSource);
$("clear_mask").addEventListener("click", clearMask);
$("mask_part").addEventListener("change", paintPart);
for (const side of SIDES) $(side).addEventListener("input", show);
for (const kind of ["pointerdown", "pointermove"]) $("canvas").addEventListener(kind, paint);
$("canvas").addEventListener("lostpointercapture", () => { brush = null; });
