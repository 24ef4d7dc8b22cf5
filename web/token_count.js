// Keeps what a node reports (PixArtTextEncode its token count, PixArtLoraLoader its keys) visible on it after the run.
import { app } from "../../scripts/app.js";

const WIDGETS = { PixArtTextEncode: "tokens", PixArtLoraLoader: "keys" };

function showText(node, name, text) {
  let widget = node.widgets?.find((candidate) => candidate.name === name);
  if (!widget) {
    widget = node.addWidget("text", name, "", () => {}, { serialize: false });
    widget.serialize = false; // neither in the saved workflow nor in the queued graph
  }
  widget.value = text;
  node.setDirtyCanvas(true, true);
}

app.registerExtension({
  name: "pixart.TokenCount",
  beforeRegisterNodeDef(nodeType, nodeData) {
    const name = WIDGETS[nodeData.name];
    if (!name) return;
    const onExecuted = nodeType.prototype.onExecuted;
    nodeType.prototype.onExecuted = function (output) {
      onExecuted?.apply(this, arguments);
      if (output?.text) showText(this, name, [output.text].flat().join(" "));
    };
  },
});
