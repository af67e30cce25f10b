// The small window that shows what else could have stood where a token stands.

import { percent, visible } from "./tokens.js";

/** @typedef {import("./tokens.js").Token} Token */

const GAP = 8; // pixels between the window and what it is about, and the edges of the screen

/**
 * @param {string} tag
 * @param {string} name of its class
 * @param {string} [text]
 */
function element(tag, name, text = "") {
  const made = document.createElement(tag);
  made.className = name;
  made.textContent = text;
  return made;
}

/**
 * @param {string} text a token's
 * @param {number} logprob
 * @param {boolean} taken whether it is the token that was taken
 */
function row(text, logprob, taken) {
  const made = element("div", taken ? "alternative taken" : "alternative");
  const bar = element("span", "bar");
  const share = element("span", "share");
  share.style.width = `${Math.max(100 * Math.exp(logprob), 0.5)}%`;
  bar.append(share);
  made.append(element("bdi", "token-text", visible(text)), element("span", "percent", percent(logprob)), bar);
  if (taken) made.append(element("span", "unseen", ", taken"));
  return made;
}

/** @param {Token} token */
function rows(token) {
  const taken = token.top.some(([text]) => text === token.text);
  /** @type {[string, number][]} */
  const all = taken || token.logprob === null ? token.top : [...token.top, [token.text, token.logprob]];
  return all.map(([text, logprob]) => row(text, logprob, text === token.text));
}

export class Alternatives {
  /** @type {HTMLElement | null} */
  #about = null;

  /** @param {HTMLElement} box the window, which is hidden */
  constructor(box) {
    this.box = box;
  }

  /**
   * @param {HTMLElement} about the piece of text
   * @param {Token[]} tokens that made it
   */
  show(about, tokens) {
    if (about === this.#about) return;
    this.hide();
    this.#about = about;
    about.setAttribute("aria-describedby", this.box.id);
    about.classList.add("shown");
    this.box.replaceChildren();
    for (const [i, token] of tokens.entries()) {
      const title = tokens.length > 1 ? `Token ${i + 1} of ${tokens.length}` : "Instead of";
      const head = element("div", "about", `${title} `);
      head.append(element("bdi", "token-text", visible(token.text)));
      this.box.append(head, ...rows(token));
    }
    this.box.append(element("div", "note", "The model's own odds, before temperature, top p and top k"));
    this.box.hidden = false;
    this.#place(about);
  }

  hide() {
    this.#about?.removeAttribute("aria-describedby");
    this.#about?.classList.remove("shown");
    this.#about = null;
    this.box.hidden = true;
  }

  /** @param {HTMLElement} about below it where there is room, else above */
  #place(about) {
    // The first line of it that can be seen: a token may be a line's end and the beginning of the next.
    const lines = [...about.getClientRects()];
    const at = lines.find((line) => line.width > 0) ?? lines[0];
    if (!at) return;
    const { offsetWidth: width, offsetHeight: height } = this.box;
    const page = document.documentElement;
    const left = Math.max(GAP, Math.min(at.left, page.clientWidth - width - GAP));
    const below = at.bottom + GAP + height <= page.clientHeight || at.top < height + GAP;
    this.box.style.left = `${left + scrollX}px`;
    this.box.style.top = `${(below ? at.bottom + GAP : at.top - GAP - height) + scrollY}px`;
  }
}
