// Beside the chat: what the worker sees, what it costs, and the comparison's result. Text goes into the page as text only.

const COLUMNS = 32; // of the strip's cells, one for each number
const HALF = 2 ** 30 - 1; // numbers are residues mod 2^31 - 1, from -HALF to HALF
const BY_SCHEME = {
  slip: "Each number is an activation plus a pad that is used once: uniform noise, whatever the text is. Besides these the worker learns how many rows there are, and when.",
  "private-lora": "Each number of the query is encrypted (LWE): noise to the adapter server, whatever the text is.",
  "kv-shield": "Not shown: KV-Shield's accelerator works on the text's own values, and only the cache that it keeps is keyed.",
};
const TITLES = { "private-lora": "What the adapter server sees", "kv-shield": "What the accelerator sees" };
const element = (id) => document.getElementById(id);

const SIZES = ["B", "KB", "MB", "GB", "TB"];

function size(bytes) {
  let step = 0;
  while (bytes >= 1000 && step < SIZES.length - 1) {
    bytes /= 1000;
    step += 1;
  }
  return `${step && bytes < 100 ? bytes.toFixed(1) : Math.round(bytes)} ${SIZES[step]}`;
}

export function speed(rate) {
  return rate == null ? "–" : rate < 100 ? rate.toFixed(1) : String(Math.round(rate));
}

/** The costs of an answer are counted from one look to another. */
let base = null;
let counting = false;
export function beginAnswer(seen) {
  base = seen;
  counting = true;
}
export function endAnswer() {
  counting = false;
}

/** What the server does, in its place; written only where it has changed, or it would be read aloud with every look. */
export function state(text, kind) {
  if (element("state").textContent === text) return;
  element("state").textContent = text;
  element("state").className = `pill ${kind}`;
}

export function show(seen) {
  const words = { ok: seen.running ? "computing" : "ready", away: "the other half is away", ended: "stopped: see the server's log" };
  state(words[seen.state], seen.state === "ok" ? "ok" : "bad");
  costs(seen);
  strip(seen);
}

function costs(seen) {
  const number = new Intl.NumberFormat("en");
  for (const [id, name, form] of [["rounds", "exchanges", number.format], ["up", "bytes_up", size], ["down", "bytes_down", size]]) {
    element(`${id}-all`).textContent = form(seen[name]);
    if (counting) element(id).textContent = form(seen[name] - (seen[name] < base[name] ? 0 : base[name])); // another session: counted anew
  }
  if (counting) element("rate").textContent = speed(seen.tokens_per_s);
  const others = seen.running > 1 ? ` ${seen.running} requests are being computed now.` : "";
  const waiting = seen.waiting ? ` ${seen.waiting} wait.` : "";
  element("shared").textContent = `Numbers of all clients together.${others}${waiting}`;
}

let drawn = "";
function strip(seen) {
  const { sent, scheme } = seen;
  const possible = scheme in BY_SCHEME && scheme !== "kv-shield";
  element("strip").hidden = !possible;
  element("seen-title").textContent = TITLES[scheme] ?? "What the worker sees";
  if (!sent) {
    element("seen").textContent = possible ? "Nothing has been sent yet. Ask something." : (BY_SCHEME[scheme] ?? "Not shown for this model.");
    return;
  }
  const content = sent.residues.join();
  if (content === drawn) return;
  drawn = content;
  draw(sent.residues);
  const bytes = new Uint8Array(Int32Array.from(sent.residues.slice(0, 6)).buffer); // as they are on the wire
  element("bytes").textContent = [...bytes].map((byte) => byte.toString(16).padStart(2, "0")).join(" ") + " …";
  element("strip").setAttribute("aria-label", `The last ${sent.residues.length} of ${sent.width} masked numbers, drawn as coloured cells: noise.`);
  element("row").textContent = `${sent.residues.length} of ${sent.width} numbers of the last row, for ${sent.layer.replaceAll(",", ", ")}.`;
  element("seen").textContent = BY_SCHEME[scheme];
}

function draw(residues) {
  const canvas = element("strip");
  const side = 16;
  canvas.width = COLUMNS * side;
  canvas.height = Math.ceil(residues.length / COLUMNS) * side;
  const pen = canvas.getContext("2d");
  residues.forEach((residue, i) => {
    const place = (residue + HALF) / (2 * HALF); // 0 to 1: by the number's size the hue, by its last bits how light it is
    pen.fillStyle = `hsl(${165 + place * 165} 60% ${30 + (residue & 255) / 7}%)`;
    pen.fillRect((i % COLUMNS) * side, Math.floor(i / COLUMNS) * side, side - 1, side - 1);
  });
}

export function compared(result) {
  const most = Math.max(result.protected.tokens_per_s ?? 0, result.unprotected.tokens_per_s ?? 0);
  const same = line(result.equal ? `The same ${result.protected.tokens} tokens.` : "The texts differ. The unprotected one:", result.equal ? "same" : "other");
  const parts = [bar("protected", result.protected, most), bar("unprotected", result.unprotected, most), same];
  if (!result.equal) parts.push(line(result.unprotected.text, "mono"));
  if (result.others) parts.push(line(`Up to ${result.others} other requests were computed meanwhile: alone, both are faster.`, "hint"));
  element("compared").replaceChildren(...parts);
}

export function notCompared(text, kind = "hint") {
  element("compared").replaceChildren(line(text, kind));
}

function line(text, kind) {
  const made = document.createElement("p");
  made.className = kind;
  made.textContent = text;
  return made;
}

function bar(name, run, most) {
  const made = document.createElement("div");
  made.className = "bar";
  const rate = document.createElement("span");
  rate.textContent = `${speed(run.tokens_per_s)} tokens/s`;
  const meter = document.createElement("meter");
  meter.max = most || 1;
  meter.value = run.tokens_per_s ?? 0;
  meter.setAttribute("aria-label", name);
  made.append(rate, name, meter);
  return made;
}
