// Puts the page together: what a person does, and what follows.

import { Alternatives } from "./alternatives.js";
import { ServerError, askHealth, askModel, inWords } from "./client.js";
import { Controls, byId, input } from "./controls.js";
import { EXAMPLES } from "./examples.js";
import { Link } from "./link.js";
import { DEFAULTS, drawSeed, toRequest } from "./options.js";
import { Run } from "./run.js";
import { TextView } from "./view.js";

const KEY = "mesh-transformer.key"; // of the session's storage
const AGAIN = 1500; // milliseconds between questions to a server that is not ready

const prompt = /** @type {HTMLTextAreaElement} */ (byId("prompt"));
const key = input("key");
const alternatives = new Alternatives(byId("alternatives"));
const view = new TextView(byId("text"), alternatives);
const link = new Link(() => ({ prompt: prompt.value, options: controls.options }));
const controls = new Controls(() => link.follow());

/** @type {Run | null} */
let running = null;
/** @type {string | null} */
let model = null;

/**
 * Buttons that can do nothing stay where they are and keep the focus.
 * @param {string} id
 * @param {boolean} usable
 */
function allow(id, usable) {
  byId(id).setAttribute("aria-disabled", String(!usable));
}

/**
 * @param {string} id
 * @param {() => void} act
 */
function onPress(id, act) {
  byId(id).addEventListener("click", () => {
    if (byId(id).getAttribute("aria-disabled") !== "true") act();
  });
}

/** @param {string} text for everybody, also for those who hear the page */
function say(text) {
  byId("status").textContent = text;
}

/** @param {string} text "" takes it away */
function showError(text) {
  byId("error").textContent = text;
  byId("error").hidden = !text;
}

// The prompt

/** Browsers that cannot size a field by what is in it are helped. */
function grow() {
  if (CSS.supports("field-sizing", "content")) return;
  prompt.style.height = "auto";
  prompt.style.height = `${prompt.scrollHeight + prompt.offsetHeight - prompt.clientHeight}px`;
}

/** @param {string} text */
function setPrompt(text) {
  prompt.value = text;
  grow();
  link.write();
}

function restore() {
  const held = link.read();
  controls.options = held?.options ?? { ...DEFAULTS, seed: drawSeed() };
  prompt.value = held?.prompt ?? "";
  grow();
  showError(held?.problems.length ? `The link was not all usable. ${held.problems.join(" ")}` : "");
  link.write();
}

function addExamples() {
  for (const { name, prompt: text } of EXAMPLES) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = name;
    button.addEventListener("click", () => {
      if (prompt.value && prompt.value !== text) link.keep();
      setPrompt(text);
    });
    byId("examples").append(button);
  }
}

// A completion

/** @param {number} count */
const inTokens = (count) => `${count} ${count === 1 ? "token" : "tokens"}`;

/**
 * @param {import("./run.js").Ending} ending
 * @param {number} limit tokens that were asked for
 */
function tell(ending, limit) {
  const { how, written, read } = ending;
  const tokens = inTokens(written);
  const words = {
    stop: `The model ended its text after ${tokens}.`,
    length: written < limit ? `Stopped after ${tokens}: the context is full.` : `Stopped at the length of ${tokens}.`,
    stopped: `Stopped by you after ${tokens}.`,
    failed: written ? `Broken off after ${tokens}.` : "Nothing was written.",
  };
  say(words[how] + (read === null ? "" : ` The prompt has ${inTokens(read)}.`));
  if (how !== "failed") return;
  showError(inWords(ending.error));
  if (ending.error instanceof ServerError && ending.error.status === 401) openKey();
  watchHealth();
}

function openKey() {
  for (const id of ["settings", "key-box"]) /** @type {HTMLDetailsElement} */ (byId(id)).open = true;
  key.focus();
}

/** @param {Run} run */
function showRate(run) {
  if (run !== running && running) return;
  // Breaks, if it must, after the dot.
  const rate = run.rate === null ? "" : `\u00a0· ${run.rate.toFixed(run.rate < 100 ? 1 : 0)}\u00a0tokens/s`;
  byId("rate").textContent = run.count ? inTokens(run.count).replace(" ", "\u00a0") + rate : running ? "waiting …" : "";
}

/** @param {string} text the prompt; a text field would change its line ends */
async function generate(text) {
  if (running) return;
  showError("");
  controls.nextSeed();
  link.write();
  const run = new Run((more, tokens) => {
    view.add(more, tokens);
    showRate(run);
  });
  running = run;
  view.begin(text);
  say("Generating.");
  showRate(run);
  for (const id of ["generate", "continue", "copy-text"]) allow(id, false);
  allow("stop", true);
  const request = toRequest(text, controls.options, model);
  const ending = await run.go(request, key.value);
  running = null;
  view.end(ending.how === "stop");
  showRate(run);
  allow("stop", false);
  allow("generate", true);
  allow("continue", view.hasCompletion);
  allow("copy-text", view.text !== "");
  tell(ending, request.max_tokens);
}

function stop() {
  running?.stop();
}

function goOn() {
  const { text } = view;
  setPrompt(text);
  generate(text);
}

/**
 * @param {string} text
 * @param {string} done what to say then
 */
async function copy(text, done) {
  try {
    await navigator.clipboard.writeText(text);
    say(done);
  } catch {
    say(copyOldWay(text) ? done : "The browser does not let this page copy.");
  }
}

/**
 * Pages that came without TLS have no clipboard of the new kind.
 * @param {string} text
 */
function copyOldWay(text) {
  const before = document.activeElement;
  const field = document.createElement("textarea");
  field.className = "unseen";
  field.value = text;
  document.body.append(field);
  field.select();
  const copied = document.execCommand("copy");
  field.remove();
  if (before instanceof HTMLElement) before.focus();
  return copied;
}

// The server

let watching = false;

/** Asks until the server is ready, and shows what it says. */
async function watchHealth() {
  if (watching) return;
  watching = true;
  for (;;) {
    const status = await askHealth().catch(() => "not reachable");
    byId("health").dataset.state = status === "ok" ? "ready" : "waiting";
    byId("health").textContent = status === "ok" ? "ready" : status;
    if (status === "ok") break;
    await new Promise((done) => setTimeout(done, AGAIN));
  }
  watching = false;
  await nameModel();
}

async function nameModel() {
  try {
    const answer = await askModel(key.value);
    model = answer.name;
    byId("model").textContent = answer.name;
    byId("context").textContent = answer.context ? `${answer.context.toLocaleString("en")} tokens of context` : "";
  } catch (error) {
    // Without a key the name stays untold; a completion needs none.
    byId("context").textContent = error instanceof ServerError && error.status === 401 ? "asks for an API key" : "";
  }
}

function start() {
  if (/Mac|iPhone|iPad/.test(navigator.platform)) byId("generate-keys").textContent = "⌘ Enter";
  // On a narrow screen the settings would stand between the prompt and its text.
  if (matchMedia("(max-width: 56rem)").matches) byId("settings").removeAttribute("open");
  addExamples();
  try {
    key.value = sessionStorage.getItem(KEY) ?? "";
  } catch {
    // Storage closed to the page: the key lasts as long as the page.
  }
  key.addEventListener("change", () => {
    try {
      sessionStorage.setItem(KEY, key.value);
    } catch {
      // As above.
    }
    nameModel();
  });
  prompt.addEventListener("input", () => {
    grow();
    link.follow();
  });
  addEventListener("hashchange", restore);
  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      generate(prompt.value);
    } else if (event.key === "Escape") {
      alternatives.hide();
      stop();
    }
  });
  onPress("generate", () => generate(prompt.value));
  onPress("stop", stop);
  onPress("continue", goOn);
  onPress("copy-text", () => copy(view.text, "Text copied."));
  onPress("copy-link", () => copy(link.toShare(), "Link copied. It keeps the seed, so that it gives the same text."));
  restore();
  watchHealth();
}

start();
