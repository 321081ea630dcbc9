// The page: draws as somebody types, edits on the board, remembers what it drew.

import { Board } from "/canvas.js";

const $ = (id) => document.getElementById(id);
const PAUSE = 50; // ms after the last key until a picture is asked for
const KEPT = 60; // pictures of the history

let token = sessionStorage.getItem("token");
let asking = 0; // the number of the newest request: what comes of older ones is not shown
let job = null; // the id of the newest job
let timer = null;
let result = null; // {image, settings}
const board = new Board($("board"), () => soon());

async function call(path, options = {}) {
  const headers = { ...(options.headers ?? {}) };
  if (token) headers.authorization = `Bearer ${token}`;
  const answer = await fetch(path, { ...options, headers });
  if (answer.status === 401) {
    token = prompt("The token that `latentdiff serve` printed:");
    if (token === null) throw new Error("the token is needed");
    sessionStorage.setItem("token", token);
    return call(path, options);
  }
  if (!answer.ok) {
    const body = await answer.json().catch(() => ({}));
    throw new Error(body.error?.message ?? answer.statusText);
  }
  return answer;
}

function tell(text, wrong = false) {
  $("told").textContent = text;
  $("told").classList.toggle("error", wrong);
}

// What the page asks for now, by the names of the server.
function settings() {
  return {
    prompt: $("prompt").value.trim(),
    negative_prompt: $("negative").value.trim() || null,
    seed: $("seed").value.trim() || "0",
    num_inference_steps: Number($("steps").value),
    guidance_scale: Number($("guidance").value),
    num_images: Number($("number").value) || 1,
    solver: $("solver").value || null,
  };
}

function restore(kept) {
  $("prompt").value = kept.prompt ?? "";
  $("negative").value = kept.negative_prompt ?? "";
  if (kept.seed !== undefined) $("seed").value = `${kept.seed}`;
  if (kept.num_inference_steps) $("steps").value = kept.num_inference_steps;
  if (kept.guidance_scale) $("guidance").value = kept.guidance_scale;
  $("solver").value = kept.solver ?? "";
  if ($("solver").selectedIndex < 0) $("solver").value = "";
  $("lock").checked = true;
  label();
}

function label() {
  for (const name of ["steps", "guidance", "strength"]) $(`${name}-shown`).value = $(name).value;
  $("strength-row").hidden = !(board.opened || board.painted) || board.masked;
  $("hint").hidden = Boolean(board.opened || board.painted || board.showing || board.tool);
}

function soon() {
  label();
  clearTimeout(timer);
  if ($("typing").checked) timer = setTimeout(draw, PAUSE);
}

// JSON with the seed as a number: it may be larger than JavaScript's numbers hold.
function bodyOf(wanted) {
  const { seed, ...rest } = wanted;
  const digits = /^0*([0-9]+)$/.exec(seed)?.[1] ?? "0";
  return `${JSON.stringify(rest).slice(0, -1)},"seed":${digits}}`;
}

async function draw() {
  clearTimeout(timer);
  const asked = settings();
  if (!asked.prompt) return tell("");
  const mine = ++asking;
  const wanted = { ...asked, image: board.image, mask: board.maskImage, replaces: job };
  wanted.only_masked = Boolean(wanted.mask);
  if (wanted.image && !wanted.mask) wanted.strength = Number($("strength").value);
  const began = performance.now();
  try {
    const headers = { "content-type": "application/json" };
    const answer = await call("/jobs", { method: "POST", headers, body: bodyOf(wanted) });
    const begun = await answer.json();
    if (mine !== asking) {
      await call(`/jobs/${begun.id}`, { method: "DELETE" });
      return;
    }
    job = begun.id;
    for await (const now of eventsOf(begun.id)) {
      if (mine !== asking) return;
      $("progress").hidden = now.state !== "drawing" && now.state !== "waiting";
      $("progress").value = now.progress;
      if (now.preview) board.show(await picture(now.preview));
      if (now.state === "failed") tell(now.error, true);
      if (now.state === "done") await finish(now, asked, began);
    }
  } catch (error) {
    if (mine !== asking) return;
    $("progress").hidden = true;
    tell(error.message, true);
  }
}

async function* eventsOf(id) {
  const answer = await call(`/jobs/${id}/events`);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const events = (text + value).split("\n\n");
      text = events.pop();
      for (const event of events) yield JSON.parse(event.replace(/^data: /, ""));
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

async function finish(now, asked, began) {
  const seconds = ((performance.now() - began) / 1000).toFixed(1);
  for (const [index, path] of now.pictures.entries()) {
    const blob = await (await call(path)).blob();
    const image = await picture(URL.createObjectURL(blob));
    remember({ image, settings: { ...asked, seed: now.seeds[index] } });
  }
  tell([`seed ${now.seeds[0]}, ${seconds} s`, ...now.told].join(" · "));
  if (!$("lock").checked) $("seed").value = fresh();
}

const fresh = () => `${Math.floor(Math.random() * 2 ** 32)}`;

function another() {
  $("seed").value = fresh();
  return draw();
}

function picture(address) {
  const image = new Image();
  image.src = address;
  return image.decode().then(() => image);
}

function choose(one) {
  result = one;
  if (!board.opened && !board.painted) {
    board.canvas.width = 512;
    board.canvas.height = Math.round((512 * one.image.naturalHeight) / one.image.naturalWidth);
  }
  board.show(one.image);
  $("keep").disabled = $("before").disabled = false;
  $("download").hidden = false;
  $("download").href = one.image.src;
  $("download").download = `${one.settings.seed}.png`;
  label();
}

function remember(one) {
  const button = document.createElement("button");
  button.title = `${one.settings.prompt}, seed ${one.settings.seed}`;
  const thumb = one.image.cloneNode();
  thumb.alt = button.title;
  button.append(thumb);
  button.addEventListener("click", () => {
    restore(one.settings);
    choose(one);
  });
  $("history").prepend(button);
  while ($("history").children.length > KEPT) {
    URL.revokeObjectURL($("history").lastChild.firstChild.src);
    $("history").lastChild.remove();
  }
  choose(one);
}

// The settings in a PNG of ours: the text chunk `latentdiff`, as tEXt or iTXt.
async function settingsIn(file) {
  const bytes = new Uint8Array(await file.arrayBuffer());
  const view = new DataView(bytes.buffer);
  if (bytes.length < 8 || view.getUint32(0) !== 0x89504e47) return null;
  for (let at = 8; at + 12 <= bytes.length; ) {
    const length = view.getUint32(at);
    const kind = String.fromCharCode(...bytes.slice(at + 4, at + 8));
    const data = bytes.slice(at + 8, at + 8 + length);
    const end = data.indexOf(0);
    const name = new TextDecoder("latin1").decode(data.slice(0, Math.max(end, 0)));
    if ((kind === "tEXt" || kind === "iTXt") && name === "latentdiff") {
      let start = end + 1;
      if (kind === "iTXt") start = data.indexOf(0, data.indexOf(0, start + 2) + 1) + 1;
      const text = new TextDecoder(kind === "iTXt" ? "utf-8" : "latin1").decode(data.slice(start));
      return JSON.parse(text.replace(/"seed": ?([0-9]+)/, '"seed": "$1"'));
    }
    at += 12 + length;
  }
  return null;
}

async function open(file) {
  try {
    const kept = await settingsIn(file);
    const image = await picture(URL.createObjectURL(file));
    if (typeof kept?.prompt === "string" && typeof kept.seed === "string") {
      restore(kept);
      remember({ image, settings: settings() });
      tell("its settings are back; Use result edits the picture itself");
      return;
    }
    board.open(image);
    tell("mark what is to be painted anew, or say how much may change");
    label();
  } catch {
    tell("that is no picture that can be shown", true);
  }
}

function take(tool) {
  board.tool = board.tool === tool ? null : tool;
  for (const button of document.querySelectorAll("[data-tool]")) {
    button.setAttribute("aria-pressed", `${button.dataset.tool === board.tool}`);
  }
  $("board").classList.toggle("tool", Boolean(board.tool));
  if (board.tool) {
    const marks = board.tool !== "paint";
    if (marks && result && !board.opened && !board.painted) board.open(result.image);
    board.show(null);
  }
  label();
}

function before(held) {
  board.before = held;
  board.draw();
}

const press = {
  undo: () => board.undo(),
  clear: () => board.clear(),
  blank: () => {
    if (board.tool) take(board.tool);
    board.reset(512, 512);
    soon();
  },
  keep: () => {
    if (!result) return;
    board.open(result.image);
    label();
  },
  again: another,
};
for (const [id, act] of Object.entries(press)) $(id).addEventListener("click", act);
for (const button of document.querySelectorAll("[data-tool]")) {
  button.addEventListener("click", () => take(button.dataset.tool));
}
const asks = ["prompt", "negative", "seed", "steps", "guidance", "strength", "number", "solver"];
for (const id of asks) $(id).addEventListener("input", soon);
$("colour").addEventListener("input", () => (board.colour = $("colour").value));
$("width").addEventListener("input", () => (board.width = Number($("width").value)));
$("file").addEventListener("change", () => $("file").files[0] && open($("file").files[0]));
$("before").addEventListener("pointerdown", () => before(true));
for (const kind of ["pointerup", "pointerleave"]) {
  $("before").addEventListener(kind, () => before(false));
}
for (const kind of ["dragover", "drop", "dragleave"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    $("frame").classList.toggle("dropping", kind === "dragover");
    if (kind === "drop" && event.dataTransfer.files[0]) open(event.dataTransfer.files[0]);
  });
}

const wide = (by) => {
  board.width = Math.min(160, Math.max(4, board.width + by));
  $("width").value = board.width;
};
const KEYS = {
  b: () => take("brush"),
  l: () => take("lasso"),
  p: () => take("paint"),
  z: press.undo,
  x: press.clear,
  k: press.keep,
  n: press.blank,
  o: () => $("file").click(),
  s: () => $("download").hidden || $("download").click(),
  "[": () => wide(-8),
  "]": () => wide(8),
  " ": () => before(true),
};
document.addEventListener("keydown", (event) => {
  const held = event.ctrlKey || event.metaKey;
  if (event.key === "Enter" && held) return another();
  if (held || event.target.matches("textarea, input, select, button")) return;
  const act = KEYS[event.key.toLowerCase()];
  if (act) event.preventDefault();
  act?.();
});
document.addEventListener("keyup", (event) => event.key === " " && before(false));

label();
call("/model")
  .then((answer) => answer.json())
  .then((model) => {
    $("model").textContent = model.about;
    $("steps").max = Math.min(100, model.limits.steps);
    $("number").max = model.limits.pictures;
    $("steps").value = model.num_inference_steps;
    $("guidance").value = model.guidance_scale;
    for (const name of model.solvers) $("solver").append(new Option(name, name));
    label();
  })
  .catch((error) => tell(error.message, true));
