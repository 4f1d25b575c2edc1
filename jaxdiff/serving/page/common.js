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

// What the server answers. Whatever goes wrong is an error of one sentence.
export async function ask(address, how) {
  const response = await fetch(address, how).catch(lost);
  if (response.ok) return response;
  const { error, detail } = await response.json().catch(() => ({}));
  throw new Error(detail || (error && error.message) || `The server answers ${response.status}.`);
}

// The connection broke, or Cancel broke it.
export function lost(error) {
  throw error.name === "AbortError" ? error : new Error("The server cannot be reached: see whether it still runs.");
}

export function post(address, body, signal) {
  return ask(address, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal });
}
