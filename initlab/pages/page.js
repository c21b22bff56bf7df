"use strict";
document.querySelectorAll("button.copy").forEach((button) => {
  const usual = button.textContent;
  button.addEventListener("click", async () => {
    const code = document.getElementById(button.dataset.copy);
    try {
      await navigator.clipboard.writeText(code.textContent);
    } catch (error) { // a page that was opened from a disk may not write to the clipboard by itself
      getSelection().selectAllChildren(code);
      if (!document.execCommand("copy")) {
        return; // it is selected: Ctrl+C copies it
      }
      getSelection().removeAllRanges();
    }
    button.textContent = button.dataset.done;
    setTimeout(() => { button.textContent = usual; }, 2000);
  });
});
