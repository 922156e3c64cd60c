// The page of extras/serve.py. A story is a list of tokens {id, text, logprob, top, given}: `given` are those of the
// prompt, `top` the likeliest [{id, text, logprob}] where the token was drawn. A branch is the tokens before it and
// another id; it is asked for by token ids, as the server's API takes them.
"use strict";

const $ = (id) => document.getElementById(id);
const SLIDERS = [ // field of the API, label, lowest, highest, step, what the lowest or highest value means
  ["temperature", "Temperature", 0, 2, 0.05, { 0: "greedy" }],
  ["top_k", "Top-k", 0, 200, 1, { 0: "off" }],
  ["top_p", "Top-p", 0.05, 1, 0.05, { 1: "off" }],
  ["min_p", "Min-p", 0, 0.5, 0.01, { 0: "off" }],
  ["repetition_penalty", "Repetition penalty", 1, 2, 0.05, { 1: "off" }],
  ["max_tokens", "Max tokens", 10, 1000, 10, {}],
];
const HINTS = {
  probability: "Point at a token, tap it or use the arrow keys: the likeliest ones there. Choose one to branch.",
  attention: "Point at a token, tap it or use the arrow keys: the earlier tokens that it attends to.",
};
const BYTES = "bytes:"; // how the server writes a token that is no whole character

let model; // what /api/model says
let tokens = []; // the story
let begun = []; // the tokens that the last request began with, for Retry
let ended = false; // by the token that ends a story
let past = []; // earlier stories, for Back
let attention; // {rows, first}: row t of the token number first + t
let newest; // marks the last request for attention
let current = -1; // the token that is pointed at
let running; // AbortController of the request on its way

// == 1  the server

async function request(path, body, signal) {
  const headers = { "Content-Type": "application/json" };
  if ($("key").value) headers.Authorization = `Bearer ${encodeKey($("key").value)}`;
  const options = body ? { method: "POST", headers, body: JSON.stringify(body), signal } : { headers, signal };
  const answer = await fetch(path, options);
  if (answer.ok) return answer;
  if (answer.status === 401) $("keyfield").hidden = !($("settings").open = true);
  const found = await answer.json().catch(() => null);
  throw new Error(found?.error?.message ?? `the server answers ${answer.status}`);
}

// A header carries bytes: UTF-8, each as a character.
const encodeKey = (key) => String.fromCharCode(...new TextEncoder().encode(key));

async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new Error("the connection ended before the story did");
    const parts = (held + value).split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      const data = part.slice("data: ".length);
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

// == 2  stories

// Texts of tokens as the server writes them -> what each adds to the text.
function textsOf(names) {
  const decoder = new TextDecoder(), encoder = new TextEncoder();
  return names.map((name) => {
    const hex = name.startsWith(BYTES) ? name.slice(BYTES.length).split("\\x").slice(1) : null;
    const bytes = hex ? Uint8Array.from(hex, (two) => parseInt(two, 16)) : encoder.encode(name);
    return decoder.decode(bytes, { stream: true });
  });
}

function settings() {
  const found = { seed: $("seed").value === "" ? Math.floor(Math.random() * 1e6) : Number($("seed").value) };
  for (const [name] of SLIDERS) found[name] = Number($(name).value);
  return found;
}

// Tell what follows `before`, or the text of the prompt if it is empty.
async function tell(before, seed) {
  running?.abort();
  const controller = running = new AbortController();
  const fields = { ...settings(), ...(seed === undefined ? {} : { seed }) };
  const ids = before.map((token) => token.id).slice(1 - model.seq_len);
  const prompt = before.length ? ids : $("prompt").value;
  const body = { ...fields, prompt, stream: true, logprobs: 10, return_token_ids: true };
  begun = before;
  tokens = [...before];
  ended = false;
  attention = undefined;
  showStory();
  showState(fields.seed);
  const start = performance.now();
  let count = 0, finish;
  try {
    let characters = [], last;
    for await (const event of events(await request("v1/completions", body, controller.signal))) {
      const choice = event.choices[0];
      if (!choice) continue;
      if (choice.prompt_token_ids && !before.length) {
        const texts = textsOf(choice.prompt_tokens.slice(1));
        texts.unshift("start");
        tokens = choice.prompt_token_ids.map((id, i) => ({ id, text: texts[i], given: true }));
        begun = [...tokens];
        showStory();
      }
      characters = characters.concat(Array.from(choice.text));
      const found = choice.logprobs;
      choice.token_ids.forEach((id, i) => {
        const values = Object.entries(found.top_logprobs[i]);
        const top = values.map(([text, logprob], j) => ({ id: found.top_token_ids[i][j], text, logprob }));
        const token = { id, logprob: found.token_logprobs[i], top, offset: found.text_offset[i] };
        if (last) setText(last, characters.slice(last.offset, token.offset).join(""));
        tokens.push(last = token);
        addToken(tokens.length - 1);
        count += 1;
      });
      if (last) setText(last, characters.slice(last.offset).join(""));
      finish = choice.finish_reason ?? finish;
    }
    if (finish === "stop") showEnd();
  } catch (error) {
    if (error.name !== "AbortError") showError(error.message);
  }
  if (running !== controller) return; // another story has begun
  running = undefined;
  const seconds = (performance.now() - start) / 1000;
  const rate = count ? `, ${Math.round(count / seconds).toLocaleString("en")} tokens/s` : "";
  const tokenCount = `${count} token${count === 1 ? "" : "s"}`;
  showState(fields.seed, `${tokenCount} in ${seconds.toFixed(1)} s${rate}, seed ${fields.seed}`);
  if (mode() === "attention") showAttention();
}

// Begin again at a token of the story with another one.
function branch(at, alternative) {
  past.push({ tokens, begun, ended });
  hideAlternatives();
  const before = tokens.slice(0, at);
  const names = [...before.filter((token) => token.top).map((token) => nameOf(token)), alternative.text];
  const text = alternative.id === model.end ? "" : textsOf(names).pop();
  const token = { ...alternative, text, top: tokens[at].top, chosen: true };
  if (alternative.id !== model.end) return tell([...before, token]);
  running?.abort();
  running = undefined;
  tokens = before;
  showStory();
  showEnd();
  showState();
}

const nameOf = (token) => token.top.find((other) => other.id === token.id)?.text ?? token.text;

function retry() {
  past.push({ tokens, begun, ended });
  const seed = $("seed").value === "" ? undefined : Number($("seed").value) + 1;
  if (seed !== undefined) $("seed").value = seed;
  tell(begun, seed);
}

function back() {
  running?.abort();
  running = undefined;
  ({ tokens, begun, ended } = past.pop());
  attention = undefined;
  showStory();
  if (ended) showEnd();
  showState();
  if (mode() === "attention") showAttention();
}

// == 3  what is shown

const mode = () => document.querySelector("[name=mode]:checked").value;
const spans = () => $("story").querySelectorAll(".token");

function showStory() {
  hideAlternatives();
  $("error").hidden = true;
  $("story").replaceChildren();
  current = -1;
  tokens.forEach((_, i) => addToken(i));
}

function addToken(i) {
  const token = tokens[i], span = document.createElement("span");
  span.className = "token";
  if (token.given) span.classList.add("given");
  if (token.given && i === 0) span.classList.add("start");
  if (token.chosen) span.classList.add("chosen");
  span.dataset.i = i;
  span.tabIndex = spans().length === 1 ? 0 : -1; // one stop of the Tab key: the first token that is always seen
  token.span = span;
  setText(token, token.text ?? "");
  shade(span, mode() === "probability" ? surprise(token) : 0);
  $("story").append(span);
}

function setText(token, text) {
  token.text = text;
  token.span.textContent = text;
}

const shade = (span, value) => span.style.setProperty("--shade", value.toFixed(3));

// 0 for a certain token, 1 for one of probability e^-6 or less.
const surprise = (token) => token.logprob === undefined ? 0 : Math.min(1, -token.logprob / 6);

function showEnd() {
  ended = true;
  const end = document.createElement("div");
  end.className = "end";
  end.textContent = "The end.";
  $("story").append(end);
}

function showError(message) {
  $("error").textContent = message;
  $("error").hidden = false;
}

function showState(seed, status) {
  const busy = Boolean(running);
  document.body.classList.toggle("telling", busy);
  $("stop").disabled = !busy;
  $("retry").disabled = !begun.length || busy;
  $("more").disabled = !tokens.length || ended || busy;
  $("back").disabled = !past.length;
  $("status").textContent = busy ? `telling, seed ${seed}` : status ?? "";
}

// A space, a line break and nothing can be seen in a list.
const visible = (text) => text.replace(/ /g, "\u00b7").replace(/\n/g, "\u21b5").replace(/\t/g, "\u21e5") || "\u2205";

function showAlternatives(i) {
  const token = tokens[i], box = $("alternatives");
  if (!token?.top || mode() !== "probability") return hideAlternatives();
  box.replaceChildren(...token.top.map((other) => {
    const button = document.createElement("button"), word = document.createElement("span");
    const percent = document.createElement("span"), share = Math.exp(other.logprob);
    word.className = "word";
    word.textContent = other.id === model.end ? "the end" : visible(other.text);
    percent.className = "percent";
    percent.textContent = `${(100 * share).toFixed(1)}%`;
    button.type = "button";
    button.style.setProperty("--share", share.toFixed(4));
    if (other.id === token.id) button.setAttribute("aria-current", "true");
    button.append(word, percent);
    button.addEventListener("click", () => branch(i, other));
    return button;
  }));
  box.hidden = false;
  const line = token.span.getClientRects()[0] ?? token.span.getBoundingClientRect();
  const paper = box.parentElement.getBoundingClientRect();
  box.style.left = `${Math.max(8, Math.min(line.left - paper.left, paper.width - box.offsetWidth - 8))}px`;
  box.style.top = `${line.bottom - paper.top + 2}px`;
  if (getComputedStyle(box).position === "fixed") token.span.scrollIntoView({ block: "nearest" }); // above the sheet
}

function hideAlternatives() {
  $("alternatives").hidden = true;
}

function pointAt(i) {
  if (i < 0 || i >= tokens.length) return;
  tokens[current]?.span.classList.remove("at");
  current = i;
  tokens[i].span.classList.add("at");
  for (const span of spans()) span.tabIndex = span === tokens[i].span ? 0 : -1;
  showAlternatives(i);
  shadeAttention();
}

// == 4  attention

async function showAttention() {
  if (!tokens.length || running) return;
  const first = Math.max(0, tokens.length - model.seq_len), shown = tokens, wanted = newest = {};
  const ids = tokens.slice(first).map((token) => token.id);
  const body = { tokens: ids, layer: Number($("layer").value), head: Number($("head").value) };
  try {
    const found = await (await request("api/attention", body)).json();
    if (shown !== tokens || wanted !== newest) return; // another story, layer or head by now
    attention = { rows: found.attention, first };
    if (current < 0) pointAt(tokens.length - 1);
    shadeAttention();
  } catch (error) {
    showError(error.message);
  }
}

function shadeAttention() {
  if (mode() !== "attention" || !attention) return;
  const { rows, first } = attention, row = rows[current - first] ?? [];
  const most = Math.max(...row.slice(1), 0.05); // the first token takes what others do not need: it sets no scale
  tokens.forEach((token, i) => shade(token.span, Math.min(1, (row[i - first] ?? 0) / most)));
}

function changeMode() {
  const attending = mode() === "attention";
  document.body.classList.toggle("attending", attending);
  $("choice").hidden = !attending;
  $("legend").firstElementChild.textContent = attending ? "little" : "likely";
  $("legend").lastElementChild.textContent = attending ? "much" : "surprising";
  $("hint").textContent = HINTS[mode()];
  hideAlternatives();
  tokens.forEach((token) => shade(token.span, attending ? 0 : surprise(token)));
  if (attending) attention ? shadeAttention() : showAttention();
}

// == 5  keys, pointers, the start

function onStoryKey(event) {
  const step = { ArrowRight: 1, ArrowLeft: -1, Home: -Infinity, End: Infinity }[event.key];
  if (step !== undefined) {
    const least = mode() === "attention" ? 0 : 1;
    const next = Math.max(least, Math.min(tokens.length - 1, current + step));
    pointAt(next);
    tokens[next]?.span.focus();
  } else if (["Enter", " ", "ArrowDown"].includes(event.key)) {
    $("alternatives").querySelector("button")?.focus();
  } else {
    return;
  }
  event.preventDefault();
}

function onAlternativesKey(event) {
  const focused = document.activeElement;
  const next = { ArrowDown: focused.nextElementSibling, ArrowUp: focused.previousElementSibling }[event.key];
  if (next === undefined && event.key !== "Escape") return;
  if (event.key === "Escape") tokens[current]?.span.focus();
  else next?.focus();
  event.preventDefault();
}

function addSlider([name, label, low, high, step, meanings]) {
  const field = document.createElement("div"), text = document.createElement("label");
  const output = document.createElement("output"), input = document.createElement("input");
  field.className = "field slider";
  Object.assign(input, { id: name, type: "range", min: low, max: high, step });
  text.htmlFor = output.htmlFor = name;
  text.append(label, output);
  field.append(text, input);
  input.addEventListener("input", () => { output.textContent = meanings[input.value] ?? input.value; });
  $("sliders").append(field);
}

function reset() {
  for (const [name] of SLIDERS) {
    $(name).value = model.defaults[name];
    $(name).dispatchEvent(new Event("input"));
  }
  $("seed").value = "";
}

async function start() {
  try {
    model = await (await request("api/model")).json();
  } catch (error) {
    return showError(error.message);
  }
  $("error").hidden = true;
  const size = model.parameters.toLocaleString("en");
  $("model").textContent = `${model.model} \u00b7 ${size} parameters \u00b7 context ${model.seq_len} tokens`;
  for (const [id, count] of [["layer", model.layers], ["head", model.heads]]) {
    $(id).replaceChildren(...Array.from({ length: count }, (_, i) => new Option(i, i)));
  }
  $("tell").disabled = false;
  reset();
}

SLIDERS.forEach(addSlider);
$("tell").disabled = true;
$("settings").open = matchMedia("(min-width: 48rem)").matches;
$("hint").textContent = HINTS.probability;
$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  if ($("tell").disabled) return;
  if (tokens.length) past.push({ tokens, begun, ended });
  tell([]);
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("ask").requestSubmit();
});
$("stop").addEventListener("click", () => running?.abort());
$("retry").addEventListener("click", retry);
$("more").addEventListener("click", () => tell(tokens));
$("back").addEventListener("click", back);
$("reset").addEventListener("click", reset);
$("key").addEventListener("change", start);
$("keyfield").addEventListener("submit", (event) => event.preventDefault());
$("layer").addEventListener("change", showAttention);
$("head").addEventListener("change", showAttention);
for (const input of document.querySelectorAll("[name=mode]")) input.addEventListener("change", changeMode);
// A tap is a click alone: what a browser makes of it before (hover, focus) would open the list under the finger.
const counts = {
  pointerover: (event) => event.pointerType === "mouse",
  focusin: (event) => event.target.matches(":focus-visible"),
  click: () => true,
};
for (const name of Object.keys(counts)) {
  $("story").addEventListener(name, (event) => {
    const span = event.target.closest(".token");
    if (span && counts[name](event)) pointAt(Number(span.dataset.i));
  });
}
$("story").addEventListener("keydown", onStoryKey);
$("alternatives").addEventListener("keydown", onAlternativesKey);
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || event.defaultPrevented) return;
  if ($("alternatives").hidden) running?.abort();
  hideAlternatives();
});
document.addEventListener("click", (event) => {
  if (!event.target.closest(".paper")) hideAlternatives();
});
$("story").parentElement.addEventListener("pointerleave", (event) => {
  if (event.pointerType === "mouse" && !$("alternatives").contains(document.activeElement)) hideAlternatives();
});
start();
