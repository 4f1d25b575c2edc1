// What the other files share.

export const $ = (id) => document.getElementById(id);

export function say(text, isError = false) {
  $("status").textContent = text;
  $("status").classList.toggle("error", isError);
}

export function option(select, value, text = value) {
  const made = document.createElement("option");
  made.value = value;
  made.textContent = text;
  select.append(made);
}

// Grey elements out, and say why at the first of them: in words that screen readers read with each control.
export function unavailable(why, ...elements) {
  const said = document.createElement("small");
  said.className = "why";
  said.id = `why_${elements[0].id}`;
  said.textContent = why;
  const first = elements[0];
  const label = first.closest("label");
  (first.querySelector("summary") || (label && label.querySelector("span")) || label).append(" ", said);
  for (const element of elements) {
    const controls = "input, select, textarea, button";
    for (const part of element.matches(controls) ? [element] : element.querySelectorAll(controls)) {
      part.disabled = true;
      part.setAttribute("aria-describedby", said.id);
    }
  }
}

export function canvasOf(width, height) {
  const made = document.createElement("canvas");
  made.width = width;
  made.height = height;
  return made;
}

export function blob(canvas) {
  return new Promise((done) => canvas.toBlob(done, "image/png"));
}

export function dataUrl(file) {
  return new Promise((done, failed) => {
    const reader = new FileReader();
    reader.onload = () => done(reader.result);
    reader.onerror = () => failed(new Error("The file cannot be read."));
    reader.readAsDataURL(file);
  });
}

export async function post(address, body, signal) {
  const headers = { "Content-Type": "application/json" };
  const response = await fetch(address, { method: "POST", headers, body: JSON.stringify(body), signal });
  const found = await response.json();
  if (!response.ok) throw new Error(found.detail);
  return found;
}
