// The page: asks for a key where the server wants one, sends what is written, shows what comes.

import { Refused, events, json, useKey } from "/api.js";
import { beginAnswer, compared, endAnswer, notCompared, show, state } from "/live.js";

const LOOK_BUSY = 500; // milliseconds
const LOOK_IDLE = 2000;
const element = (id) => document.getElementById(id);

let about = null; // the last look
let messages = []; // of a model with a chat template
let lastPrompt = "";
let running = null; // an AbortController
let timer = 0;
let looks = 0;

/** Look again and again; whoever looked last goes on. Gives the error, where there was one. */
async function look() {
  clearTimeout(timer);
  const mine = ++looks;
  let failure = null;
  try {
    const seen = await json("/live");
    if (!about) open(seen);
    about = seen;
    show(seen);
  } catch (error) {
    failure = error;
    if (error.status === 401) {
      askForKey();
      return failure;
    }
    state("no answer from the server", "bad");
  }
  if (mine === looks && !document.hidden) timer = setTimeout(look, running ? LOOK_BUSY : LOOK_IDLE);
  return failure;
}

function open(seen) {
  element("key-form").hidden = true;
  element("main").hidden = false;
  element("model").textContent = seen.model;
  document.title = `${seen.model} – cloven`;
  element("tokens").max = seen.max_tokens;
  element("tokens").value = Math.min(64, seen.max_tokens);
  element("prompt-label").textContent = seen.chat ? "Message" : "Beginning of a text";
  element("empty").textContent = seen.chat
    ? "Write to the protected model."
    : "This model has no chat template: it goes on with whatever text you begin.";
  element("compare").hidden = !seen.compare;
  element("compare-how").textContent = seen.compare
    ? "Your last text through the protected model and through the original, greedily, one after the other."
    : "Start cloven serve with --compare MODEL_DIR, the original's directory, to compare speed and text here.";
  element("prompt").focus();
}

function askForKey() {
  about = null;
  element("main").hidden = true;
  element("key-form").hidden = false;
  state("needs a key", "");
  element("key").focus();
}

element("key-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  element("key-error").textContent = "";
  const key = element("key").value.trim();
  element("key").value = "";
  if (!/^[!-~]+$/.test(key)) {
    element("key-error").textContent = "A key has letters, digits and signs of ASCII, and no blanks.";
    return;
  }
  useKey(key);
  const failure = await look();
  if (failure) element("key-error").textContent = failure.message;
});

function turn(kind, text) {
  element("empty").hidden = true;
  const made = document.createElement("div");
  made.className = `turn ${kind}`;
  const who = document.createElement("b");
  who.textContent = kind === "model" ? "model" : "you";
  const content = document.createElement("p");
  content.textContent = text;
  made.append(who, content);
  element("log").append(made);
  element("log").scrollTop = element("log").scrollHeight;
  return content;
}

function busy(controller) {
  running = controller;
  for (const id of ["send", "compare", "clear"]) element(id).disabled = Boolean(controller);
  element("stop").disabled = !controller;
  element("log").setAttribute("aria-busy", String(Boolean(controller)));
}

const settings = () => ({ max_tokens: element("tokens").valueAsNumber || 64 });
const order = (prompt) => (about.chat ? { messages: [...messages, { role: "user", content: prompt }] } : { prompt });

/** Do something that can be stopped; its error is shown in plain words, in the place named. */
async function stoppable(work, fail) {
  const controller = new AbortController();
  busy(controller);
  look();
  try {
    return await work(controller.signal);
  } catch (error) {
    if (controller.signal.aborted) return "stopped";
    if (error.status === 401) askForKey();
    fail(error instanceof Refused ? error.message : "This page has failed; reload it.");
    if (!(error instanceof Refused)) console.error(error);
    return "failed";
  } finally {
    busy(null);
    await look();
  }
}

async function send(prompt) {
  element("error").textContent = "";
  element("status").textContent = "Writing …";
  lastPrompt = prompt;
  await look();
  if (!about) return;
  beginAnswer(about);
  turn("you", prompt);
  const place = turn("model", "");
  const temperature = element("temperature").valueAsNumber;
  const body = { ...order(prompt), ...settings(), stream: true, ...(Number.isNaN(temperature) ? {} : { temperature }) };
  let why = "";
  const ended = await stoppable(async (signal) => {
    for await (const event of events(about.chat ? "/v1/chat/completions" : "/v1/completions", body, signal)) {
      const choice = event.choices?.[0];
      place.textContent += choice?.delta?.content ?? choice?.text ?? "";
      why = choice?.finish_reason ?? why;
      element("log").scrollTop = element("log").scrollHeight;
    }
  }, (text) => (element("error").textContent = text));
  endAnswer();
  if (ended === "failed" && !place.textContent) element("prompt").value ||= prompt; // to be changed, or sent again
  if (ended) place.parentElement.classList.add("cut");
  if (about?.chat && place.textContent) messages.push({ role: "user", content: prompt }, { role: "assistant", content: place.textContent });
  element("status").textContent = { stopped: "Stopped.", failed: "" }[ended] ?? (why === "length" ? "Complete: as many tokens as were asked for." : "Complete.");
}

element("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  const prompt = element("prompt").value;
  if (running || !about || !prompt.trim()) return;
  element("prompt").value = "";
  send(prompt);
});

element("prompt").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  element("composer").requestSubmit();
});

element("stop").addEventListener("click", () => running?.abort());

element("clear").addEventListener("click", () => {
  messages = [];
  for (const made of [...element("log").querySelectorAll(".turn")]) made.remove();
  element("empty").hidden = false;
  for (const id of ["error", "status"]) element(id).textContent = "";
  element("prompt").focus();
});

element("compare").addEventListener("click", async () => {
  const prompt = element("prompt").value.trim() ? element("prompt").value : lastPrompt;
  if (!prompt) return notCompared("Write something first.");
  notCompared("Comparing; the first time, the original is loaded …");
  const body = { ...(about.chat ? { messages: [{ role: "user", content: prompt }] } : { prompt }), ...settings() };
  const ended = await stoppable(async (signal) => compared(await json("/compare", body, signal)), (text) => notCompared(text, "error"));
  if (ended === "stopped") notCompared("Stopped.");
});

document.addEventListener("visibilitychange", () => (document.hidden ? clearTimeout(timer) : about && look()));

look();
