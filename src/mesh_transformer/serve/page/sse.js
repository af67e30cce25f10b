// Server-sent events out of bytes that may be cut anywhere: within a character, a line or an event.

/**
 * @typedef {object} SseEvent
 * @property {string} event the event's name, "message" where the server gives none
 * @property {string} data the lines of data, joined by newlines
 */

/** Turns bytes into events; feed it pieces of any size. */
export class SseDecoder {
  #text = new TextDecoder();
  #line = "";
  #afterReturn = false;
  #event = "";
  /** @type {string[]} */
  #data = [];

  /**
   * @param {Uint8Array} bytes the next piece
   * @returns {SseEvent[]} events that are complete with it
   */
  push(bytes) {
    /** @type {SseEvent[]} */
    const events = [];
    let text = this.#text.decode(bytes, { stream: true });
    // A line ends with \n, \r or \r\n; the \n of the last may come in the next piece.
    if (this.#afterReturn && text.startsWith("\n")) text = text.slice(1);
    if (text) this.#afterReturn = text.endsWith("\r");
    const lines = (this.#line + text).split(/\r\n|\n|\r/);
    this.#line = lines.pop() ?? "";
    for (const line of lines) this.#take(line, events);
    return events;
  }

  /**
   * @param {string} line without its end
   * @param {SseEvent[]} events what an empty line completes is added here
   */
  #take(line, events) {
    if (line === "") {
      if (this.#data.length) events.push({ event: this.#event || "message", data: this.#data.join("\n") });
      this.#event = "";
      this.#data = [];
      return;
    }
    const colon = line.indexOf(":");
    const field = colon < 0 ? line : line.slice(0, colon);
    const value = colon < 0 ? "" : line.slice(colon + 1).replace(/^ /, "");
    // Lines that begin with a colon are comments; fields of other names are for clients that reconnect.
    if (field === "data") this.#data.push(value);
    else if (field === "event") this.#event = value;
  }
}

/**
 * The events of a body as they come. An unfinished one at the end is dropped, as the standard says.
 * @param {ReadableStream<Uint8Array>} body
 * @returns {AsyncGenerator<SseEvent>}
 */
export async function* readEvents(body) {
  const reader = body.getReader();
  const decoder = new SseDecoder();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      yield* decoder.push(value);
    }
  } finally {
    // Whoever stops listening lets the server know.
    reader.cancel().catch(() => {});
  }
}
