// Requests to the endpoint. The API key is in this module's memory and nowhere else.

let key = "";

export function useKey(given) {
  key = given;
}

/** An error in words for whoever reads the page; `status` is the answer's, 0 where there was none. */
export class Refused extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

function headers(body) {
  const given = body === undefined ? {} : { "content-type": "application/json" };
  return key ? { ...given, authorization: `Bearer ${key}` } : given;
}

async function ask(path, body, signal) {
  const method = body === undefined ? "GET" : "POST";
  let answer;
  try {
    answer = await fetch(path, { method, headers: headers(body), body: body && JSON.stringify(body), signal, cache: "no-store", credentials: "omit" });
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new Refused("The server cannot be reached. Is it running?", 0);
  }
  if (!answer.ok) throw new Refused(await reason(answer), answer.status);
  return answer;
}

async function reason(answer) {
  try {
    const { error } = await answer.json();
    if (answer.status === 401) return "The server does not know this key.";
    return sentence(error.message);
  } catch {
    return `The server answered with status ${answer.status} and no reason.`;
  }
}

function sentence(text) {
  const plain = String(text);
  return plain.charAt(0).toUpperCase() + plain.slice(1) + (/[.?!]$/.test(plain) ? "" : ".");
}

export async function json(path, body, signal) {
  return (await ask(path, body, signal)).json();
}

/** The data of every event of a stream, parsed, until [DONE]. */
export async function* events(path, body, signal) {
  const answer = await ask(path, body, signal);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    let piece;
    try {
      piece = await reader.read();
    } catch (error) {
      if (signal?.aborted) throw error;
      throw new Refused("The connection was lost in the middle of the answer.", 0);
    }
    if (piece.done) throw new Refused("The answer ended before it was complete.", 0);
    const parts = (held + piece.value).split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      if (!part.startsWith("data: ")) continue;
      const data = part.slice("data: ".length);
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Refused(sentence(event.error.message), 200);
      yield event;
    }
  }
}
