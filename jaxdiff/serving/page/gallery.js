// Images that form, and those that are finished.

import { $ } from "./common.js";

const MANY_IMAGES = 40; // that the gallery keeps

export function preview(index, address) {
  let image = $("previews").querySelector(`[data-index="${index}"]`);
  if (!image) {
    image = document.createElement("img");
    image.dataset.index = index;
    image.alt = `Image ${index + 1}, being drawn`;
    $("previews").append(image);
  }
  image.src = address;
}

export function clearPreviews() {
  $("previews").replaceChildren();
}

// The place for the images of one request: before all earlier ones, in their order.
export function place() {
  return $("gallery").firstElementChild;
}

// Put an image into the gallery.
//   before: what `place` gave
//   shown: words about it
//   name: of the file to download
//   actions: what is done by the buttons of these classes; without one a button is left out
export function keep(address, before, shown, name, actions) {
  const item = $("item").content.cloneNode(true).firstElementChild;
  const image = item.querySelector("img");
  image.src = address;
  image.alt = shown;
  item.querySelector("figcaption").textContent = shown;
  const link = item.querySelector(".download");
  link.href = address;
  link.download = `${name.replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 60) || "image"}.png`;
  for (const button of item.querySelectorAll("button")) {
    const action = actions[button.className];
    if (action) button.addEventListener("click", () => action(image));
    else button.remove();
  }
  $("gallery").insertBefore(item, before && before.isConnected ? before : null);
  while ($("gallery").children.length > MANY_IMAGES) $("gallery").lastElementChild.remove();
}
