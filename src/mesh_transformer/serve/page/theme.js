// Dark or light: the system's choice until the person makes another, which this browser remembers.
// A plain script, run before the page is drawn.
"use strict";

(() => {
  const NAME = "mesh-transformer.theme";

  /** What was chosen earlier; storage may be closed to the page, which then follows the system. */
  function chosen() {
    try {
      return localStorage.getItem(NAME);
    } catch {
      return null;
    }
  }

  /** @param {string} theme "dark" or "light" */
  function choose(theme) {
    document.documentElement.dataset.theme = theme;
    try {
      localStorage.setItem(NAME, theme);
    } catch {
      // Then the choice lasts as long as the page.
    }
  }

  const before = chosen();
  if (before === "dark" || before === "light") document.documentElement.dataset.theme = before;

  document.addEventListener("DOMContentLoaded", () => {
    document.getElementById("theme")?.addEventListener("click", () => {
      const system = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
      const now = document.documentElement.dataset.theme ?? system;
      choose(now === "dark" ? "light" : "dark");
    });
  });
})();
