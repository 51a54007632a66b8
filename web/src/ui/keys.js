/** Keys of the page. They do nothing while a person types or a dialog is open. */

const PAN = 40; // screen pixels
const TOOLS = { v: "move", b: "brush", e: "eraser", p: "add", c: "cut" };

/** @param {object} page its view, tools, panel and actions */
export function addKeys({ view, tools, panel, chooseTool, toggleOverlay, step, actions }) {
  const arrows = { ArrowLeft: [PAN, 0], ArrowRight: [-PAN, 0], ArrowUp: [0, PAN], ArrowDown: [0, -PAN] };
  const keys = {
    "+": actions["zoom-in"],
    "=": actions["zoom-in"],
    "-": actions["zoom-out"],
    0: actions.fit,
    "[": () => tools.resize(0.9),
    "]": () => tools.resize(1.1),
    f: actions.holes,
    l: actions.largest,
    o: toggleOverlay,
    s: actions["save-all"],
    n: () => step(1),
    N: () => step(-1),
    "?": actions.help,
    Enter: () => tools.close(),
    Escape: () => tools.drop(),
    Backspace: () => tools.removeCorner(),
  };
  addEventListener("keydown", (event) => {
    const { key, target } = event;
    const typing = target.matches("input[type=text]") || document.querySelector("dialog[open]");
    if (typing || event.altKey) return;
    if (event.ctrlKey || event.metaKey) {
      const back = key.toLowerCase() === "z" && !event.shiftKey;
      const forward = key.toLowerCase() === "y" || (key.toLowerCase() === "z" && event.shiftKey);
      if (back || forward) {
        event.preventDefault();
        (back ? actions.undo : actions.redo)();
      }
      return;
    }
    const onStage = target.id === "stage";
    if (arrows[key] && onStage) view.pan(...arrows[key].map((pixels) => pixels * devicePixelRatio));
    else if (TOOLS[key]) chooseTool(TOOLS[key]);
    else if (/^[1-9]$/.test(key)) panel.select(Number(key));
    else if (key === "Enter" && !onStage) return; // presses the button that has the focus
    else if (keys[key]) keys[key]();
    else return;
    event.preventDefault();
  });
}
