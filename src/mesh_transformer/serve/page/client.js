// Asks the server, and says in words what went wrong.

import { readEvents } from "./sse.js";
import { toTokens } from "./tokens.js";

/** @typedef {import("./tokens.js").Token} Token */

/**
 * @typedef {object} Piece
 * @property {string} text
 * @property {Token[]} tokens
 * @property {string | null} finishReason "stop" or "length", on the last piece with text
 * @property {{prompt_tokens: number, completion_tokens: number} | null} usage
 */

/** The server answered with an error, or ended its answer with one. */
export class ServerError extends Error {
  /**
   * @param {number} status of HTTP; 200 if the error came in the middle of an answer
   * @param {string} message the server's own words
   * @param {number | null} retryAfter seconds, where the server says so
   */
  constructor(status, message, retryAfter = null) {
    super(message);
    this.name = "ServerError";
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

/** The server cannot be reached, or the connection broke. */
export class ConnectionError extends Error {
  /** @param {boolean} begun whether an answer had begun */
  constructor(begun) {
    super(begun ? "The connection broke before the completion ended." : "The server cannot be reached.");
    this.name = "ConnectionError";
    this.begun = begun;
  }
}

/** @param {string} key */
const authorization = (key) => (key ? { Authorization: `Bearer ${key}` } : undefined);

/**
 * @param {string} path relative to the page
 * @param {RequestInit} [init]
 * @returns {Promise<Response>}
 */
async function ask(path, init) {
  try {
    return await fetch(path, init);
  } catch (error) {
    if (init?.signal?.aborted) throw error;
    throw new ConnectionError(false);
  }
}

/**
 * @param {Response} response that is not ok
 * @returns {Promise<ServerError>}
 */
async function refusal(response) {
  const wait = Number.parseFloat(response.headers.get("Retry-After") ?? "");
  let message = `The server answered ${response.status} ${response.statusText}`.trimEnd() + ".";
  try {
    message = (await response.json()).error.message ?? message;
  } catch {
    // Something between here and the server answered, in its own shape.
  }
  return new ServerError(response.status, message, Number.isFinite(wait) ? wait : null);
}

/**
 * @param {string} data of one event
 * @returns {Piece}
 * @throws {ServerError}
 */
function toPiece(data) {
  try {
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ServerError(200, chunk.error.message);
    const choice = chunk.choices[0];
    return {
      text: choice?.text ?? "",
      tokens: toTokens(choice?.logprobs),
      finishReason: choice?.finish_reason ?? null,
      usage: chunk.usage ?? null,
    };
  } catch (error) {
    if (error instanceof ServerError) throw error;
    throw new ServerError(200, `it sent something that is no piece of a completion: ${data.slice(0, 80)}`);
  }
}

/**
 * One completion, piece by piece.
 * @param {object} request body of the request
 * @param {string} key the API key, or ""
 * @param {AbortSignal} signal ends it; the server notices
 * @returns {AsyncGenerator<Piece>}
 * @throws {ServerError | ConnectionError | DOMException}
 */
export async function* complete(request, key, signal) {
  const response = await ask("v1/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json", ...authorization(key) },
    body: JSON.stringify(request),
    signal,
  });
  if (!response.ok || !response.body) throw await refusal(response);
  try {
    for await (const { data } of readEvents(response.body)) {
      if (data === "[DONE]") return;
      yield toPiece(data);
    }
  } catch (error) {
    // A connection that breaks is a TypeError to fetch.
    if (signal.aborted || !(error instanceof TypeError)) throw error;
    throw new ConnectionError(true);
  }
  throw new ConnectionError(true); // ended without [DONE]
}

/**
 * @param {string} key
 * @returns {Promise<{name: string, context: number | null}>} context: tokens that the model sees at once
 * @throws {ServerError | ConnectionError}
 */
export async function askModel(key) {
  const response = await ask("v1/models", { headers: authorization(key) });
  if (!response.ok) throw await refusal(response);
  const [model] = (await response.json()).data;
  return { name: model.id, context: model.max_model_len ?? null };
}

/**
 * @returns {Promise<string>} "ok", or what the server does instead: "warming up", "shutting down"
 * @throws {ConnectionError}
 */
export async function askHealth() {
  const response = await ask("health", { cache: "no-store" });
  try {
    return String((await response.json()).status);
  } catch {
    return `answers ${response.status}`;
  }
}

/**
 * @param {unknown} error of `complete`
 * @returns {string} what happened and what to do
 */
export function inWords(error) {
  if (error instanceof ConnectionError) {
    return error.begun
      ? `${error.message} What came until then is kept.`
      : `${error.message} See whether it still runs and whether you are on line, then try again.`;
  }
  if (!(error instanceof ServerError)) throw error;
  const { status, message, retryAfter } = error;
  if (status === 401) return `This server asks for an API key. Enter it under Settings, then try again. (${message})`;
  if (status === 429) {
    const when = retryAfter === null ? "in a moment" : `in ${retryAfter} ${retryAfter === 1 ? "second" : "seconds"}`;
    return `Too many others are being served. Try again ${when}. (${message})`;
  }
  if (status === 503) return `The server takes no requests at the moment. Try again in a while. (${message})`;
  if (status >= 500 || status === 200) return `The server failed: ${message}`;
  return `The server refused this: ${message}`;
}
