"use strict";
const dialog = document.querySelector("dialog");
if (dialog) {
  const buttons = [...document.querySelectorAll(".enlarge")];
  const large = dialog.querySelector("img");
  const caption = dialog.querySelector("figcaption");
  let shown = 0;
  const show = (number) => {
    shown = (number + buttons.length) % buttons.length;
    const small = buttons[shown].firstElementChild;
    large.src = small.src;
    large.alt = caption.textContent = small.alt;
    large.hidden = false;
    large.classList.toggle("flat", small.src.startsWith("data:image/png"));
  };
  buttons.forEach((button, number) => button.addEventListener("click", () => { show(number); dialog.showModal(); }));
  dialog.querySelectorAll("[data-step]").forEach((button) =>
    button.addEventListener("click", () => show(shown + Number(button.dataset.step))));
  dialog.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (step) show(shown + step);
  });
  dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
  dialog.addEventListener("close", () => buttons[shown].focus());
}
