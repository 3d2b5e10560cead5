"use strict";
// Texts of the charts' parts follow the pointer; without this script they are plain titles.
const tip = document.getElementById("tip");
for (const title of document.querySelectorAll("svg.chart .hover > title")) {
  title.parentNode.dataset.text = title.textContent;
  title.remove();
}
function show(event) {
  const part = event.target.closest ? event.target.closest(".hover") : null;
  if (!part) {
    tip.style.visibility = "hidden";
    return;
  }
  tip.textContent = part.dataset.text;
  const box = tip.getBoundingClientRect();
  const left = Math.min(event.clientX + 14, window.innerWidth - box.width - 8);
  const above = event.clientY - box.height - 12;
  tip.style.left = Math.max(8, left) + "px";
  tip.style.top = (above > 8 ? above : event.clientY + 18) + "px";
  tip.style.visibility = "visible";
}
document.addEventListener("pointermove", show);
document.addEventListener("pointerdown", show);
document.addEventListener("scroll", () => { tip.style.visibility = "hidden"; }, { passive: true });
document.getElementById("save").addEventListener("click", (event) => {
  const text = document.getElementById("result").textContent + "\n";
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  link.download = event.currentTarget.dataset.file;
  link.click();
  URL.revokeObjectURL(link.href);
});
