// A sidebar tab that shows what Forebay does, and sets the headroom.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

const EVERY_MS = 1000;
const COLOURS = { R: "#1b6ca8", S: "#f2a541", ".": "rgba(128, 128, 128, 0.25)" };
const NAMES = { R: "resident", S: "streamed", ".": "absent" };
const MODES = {
  "drop-in": "ComfyUI's dynamic VRAM runs on Forebay",
  native: "diffusion models run on Forebay's weights",
  off: "ComfyUI runs without dynamic VRAM",
};
const STYLE = `
.forebay { padding: 12px; font-size: 13px; line-height: 1.45; overflow: auto; height: 100%; box-sizing: border-box; }
.forebay h3 { margin: 14px 0 4px; font-size: 14px; font-weight: 600; }
.forebay table { border-collapse: collapse; width: 100%; }
.forebay td { padding: 1px 0; } .forebay td:last-child { text-align: right; font-variant-numeric: tabular-nums; }
.forebay canvas { width: 100%; display: block; margin: 4px 0; image-rendering: pixelated; }
.forebay .muted { opacity: 0.7; } .forebay .error { color: #d33; }
.forebay input { width: 6em; } .forebay .key i { display: inline-block; width: 10px; height: 10px; margin: 0 4px 0 10px; }
`;

function bytes(n) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (n >= 1024 && unit < units.length - 1) {
    n /= 1024;
    unit += 1;
  }
  return `${unit === 0 || n >= 100 ? Math.round(n) : n.toFixed(1)} ${units[unit]}`;
}

function element(tag, properties = {}, children = []) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function table(rows) {
  const cells = ([name, value]) => element("tr", {}, [element("td", { textContent: name }), element("td", { textContent: value })]);
  return element("table", {}, rows.map(cells));
}

// One block a page, at most 64 in a line; a map of very many pages has several pages a block.
function pageMap(map) {
  const most = 64 * 48;
  const step = Math.ceil(map.length / most) || 1;
  const blocks = Math.ceil(map.length / step);
  const columns = Math.min(64, Math.max(blocks, 1));
  const canvas = element("canvas", { width: columns * 6, height: Math.ceil(blocks / columns) * 6 || 6, title: `${map.length} pages` });
  const context = canvas.getContext("2d");
  for (let block = 0; block < blocks; block += 1) {
    const part = map.slice(block * step, (block + 1) * step);
    const letter = ["R", "S", "."].find((one) => part.includes(one));
    context.fillStyle = COLOURS[letter];
    context.fillRect((block % columns) * 6, Math.floor(block / columns) * 6, 5, 5);
  }
  return canvas;
}

class Panel {
  constructor(root) {
    this.root = element("div", { className: "forebay" });
    this.body = element("div");
    this.headrooms = new Map();
    root.append(element("style", { textContent: STYLE }), this.root);
    this.root.append(this.body);
    this.before = null;
    this.tick();
    this.timer = setInterval(() => this.tick(), EVERY_MS);
  }

  async tick() {
    if (!this.root.isConnected && this.before) {
      clearInterval(this.timer);
      return;
    }
    try {
      const answer = await api.fetchApi("/forebay/state");
      if (!answer.ok) throw new Error(`${answer.status} ${answer.statusText}`);
      this.show(await answer.json(), performance.now());
    } catch (error) {
      this.body.replaceChildren(element("p", { className: "error", textContent: `no answer from the server: ${error.message}` }));
    }
  }

  show(state, now) {
    const rate = this.before ? ((state.streamed - this.before.streamed) / (now - this.before.now)) * 1000 : 0;
    this.before = { streamed: state.streamed, now };
    const ram = state.ram;
    const parts = [
      element("div", { className: "muted", textContent: `Forebay ${state.version}: ${MODES[state.mode]}` }),
      ...state.devices.flatMap((device) => this.device(device)),
      element("h3", { textContent: "Streamed" }),
      table([["so far", bytes(state.streamed)], ["now", `${bytes(Math.max(0, rate))}/s`]]),
      element("h3", { textContent: "RAM" }),
      table([
        ["page cache registered", bytes(ram.registered)],
        ["pinned for copies", bytes(ram.pinned)],
        ["ComfyUI's buffers", bytes(ram.buffers)],
        ["anonymous, of this process", bytes(ram.anonymous)],
        ["of files, of this process", bytes(ram.file)],
      ]),
    ];
    this.body.replaceChildren(...parts);
    this.body.dataset.streamed = state.streamed;
  }

  device(device) {
    const rows = [["weights hold", `${bytes(device.held - device.unused)} of ${bytes(device.budget)}`]];
    if (device.total !== null) rows.push(["free", `${bytes(device.free)} of ${bytes(device.total)}`]);
    const models = device.models.flatMap((model) => [
      element("div", { textContent: `${model.name}: ${bytes(model.resident)} of ${bytes(model.bytes)} resident` }),
      pageMap(model.map),
    ]);
    const key = Object.entries(NAMES).flatMap(([letter, name]) => [
      element("i", { style: `background: ${COLOURS[letter]}` }),
      name,
    ]);
    return [
      element("h3", { textContent: `${device.name}, ${device.hardware}` }),
      table(rows),
      this.headroom(device),
      ...models,
      element("div", { className: "muted key" }, models.length ? key : ["no models yet"]),
    ];
  }

  // Kept from one tick to the next, so that what is being typed stays.
  headroom(device) {
    let kept = this.headrooms.get(device.name);
    if (!kept) {
      const input = element("input", { type: "number", min: 0, step: 0.25, ariaLabel: `headroom of ${device.name} in GiB` });
      const said = element("span", { className: "error" });
      input.addEventListener("change", async () => {
        const body = JSON.stringify({ device: device.name, bytes: Math.round(Number(input.value) * 2 ** 30) });
        const answer = await api.fetchApi("/forebay/headroom", { method: "POST", body, headers: { "Content-Type": "application/json" } });
        said.textContent = answer.ok ? "" : ` ${(await answer.json()).error}`;
        input.blur();
      });
      kept = { input, row: element("label", {}, ["headroom ", input, " GiB", said]) };
      this.headrooms.set(device.name, kept);
    }
    if (document.activeElement !== kept.input) {
      kept.input.value = device.headroom === null ? "" : (device.headroom / 2 ** 30).toFixed(2);
      kept.input.placeholder = device.headroom === null ? "fixed" : "";
    }
    return kept.row;
  }
}

app.registerExtension({
  name: "Forebay",
  async setup() {
    app.extensionManager.registerSidebarTab({
      id: "forebay",
      icon: "pi pi-database",
      title: "Forebay",
      tooltip: "What Forebay keeps where",
      type: "custom",
      render: (root) => {
        root.replaceChildren();
        new Panel(root);
      },
    });
  },
});
