"use strict";
(() => {
  const tip = document.getElementById("tip");
  const points = [...document.querySelectorAll(".point")];

  // A title would show a second tooltip; what it says becomes the point's name instead.
  for (const point of points) {
    const title = point.querySelector("title");
    point.setAttribute("aria-label", title.textContent);
    title.remove();
  }

  const REACH = 14; // of the pointer, in pixels
  const SAME_PLACE = 3;
  const clamp = (value, least, most) => Math.max(least, Math.min(value, most));

  const middle = (point) => {
    const box = point.querySelector(".hit").getBoundingClientRect();
    return [box.left + box.width / 2, box.top + box.height / 2];
  };

  const near = (panel, [x, y], reach) => [...panel.querySelectorAll(".point")]
    .map((point) => [Math.hypot(...middle(point).map((at, i) => at - [x, y][i])), point])
    .filter(([distance]) => distance <= reach)
    .sort((a, b) => a[0] - b[0])
    .map(([, point]) => point);

  // Seeds of one size may lie on one another: the others are named too.
  const others = (point) => near(point.closest("svg"), middle(point), SAME_PLACE)
    .filter((other) => other !== point)
    .map((other) => `\nalso here: ${other.getAttribute("aria-label").split("\n")[0]}`);

  let current = null;
  const show = (point) => {
    if (current) current.classList.remove("current");
    current = point;
    point.classList.add("current");
    tip.textContent = point.getAttribute("aria-label") + others(point).join("");
    tip.hidden = false;
    const at = point.getBoundingClientRect();
    const own = tip.getBoundingClientRect();
    const width = document.documentElement.clientWidth;
    const above = at.top - own.height - 8;
    tip.style.left = `${clamp(at.left + at.width / 2 - own.width / 2, 8, width - own.width - 8)}px`;
    tip.style.top = `${above >= 8 ? above : at.bottom + 8}px`;
  };

  const hide = () => {
    if (current) current.classList.remove("current");
    current = null;
    tip.hidden = true;
  };

  const leave = () => {
    const focused = document.activeElement;
    if (focused && focused.classList.contains("point")) show(focused);
    else hide();
  };

  // One stop of the tab key per panel; arrows lead from point to point.
  const STEPS = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };
  const move = (event) => {
    const own = [...event.currentTarget.closest("svg").querySelectorAll(".point")];
    const here = own.indexOf(event.currentTarget);
    const ends = { Home: 0, End: own.length - 1 };
    const next = event.key in ends ? ends[event.key] : here + (STEPS[event.key] || 0);
    if (event.key === "Escape") event.currentTarget.blur();
    if (next === here || !own[next]) return;
    event.preventDefault();
    own[here].tabIndex = -1;
    own[next].tabIndex = 0;
    own[next].focus();
  };

  for (const point of points) {
    point.addEventListener("focus", () => show(point));
    point.addEventListener("blur", hide);
    point.addEventListener("keydown", move);
  }
  for (const panel of document.querySelectorAll(".panel")) {
    const nearest = (event) => near(panel, [event.clientX, event.clientY], REACH)[0];
    panel.addEventListener("pointermove", (event) => {
      const point = nearest(event);
      if (!point) leave();
      else if (point !== current) show(point);
    });
    panel.addEventListener("pointerleave", leave);
    panel.addEventListener("click", (event) => {
      const point = nearest(event);
      if (point) point.focus();
    });
  }
  addEventListener("scroll", leave, { passive: true });

  const texts = new Intl.Collator("en", { numeric: true });
  // Cells without a number or a text are last in either direction.
  const compare = (a, b, sign) => {
    const numbers = [a, b].map((cell) => parseFloat(cell.dataset.v));
    const known = numbers.map((value) => !Number.isNaN(value));
    if (known[0] && known[1]) return sign * (numbers[0] - numbers[1]);
    if (known[0] !== known[1]) return known[0] ? -1 : 1;
    const words = [a, b].map((cell) => cell.textContent);
    if (!words[0] !== !words[1]) return words[0] ? -1 : 1;
    return sign * texts.compare(words[0], words[1]);
  };

  const sort = (table, head) => {
    const heads = [...table.tHead.rows[0].cells];
    const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    for (const other of heads) other.setAttribute("aria-sort", "none");
    head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
    const column = heads.indexOf(head);
    const body = table.tBodies[0];
    const rows = [...body.rows];
    rows.sort((a, b) => compare(a.cells[column], b.cells[column], sign));
    body.append(...rows);
  };

  for (const table of document.querySelectorAll("table.sortable")) {
    for (const head of table.tHead.rows[0].cells) {
      head.firstElementChild.addEventListener("click", () => sort(table, head));
      head.firstElementChild.addEventListener("keydown", (event) => {
        if (event.key !== "Enter" && event.key !== " ") return;
        event.preventDefault();
        sort(table, head);
      });
    }
  }

  let opened = [];
  addEventListener("beforeprint", () => {
    opened = [...document.querySelectorAll("details:not([open])")];
    for (const part of opened) part.open = true;
  });
  addEventListener("afterprint", () => {
    for (const part of opened) part.open = false;
  });
})();
