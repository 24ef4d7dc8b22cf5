// Keeps the token count that PixArtTextEncode reports visible on the node after the run.
import { app } from "../../scripts/app.js";

const WIDGET = "tokens";

function showCount(node, text) {
  let widget = node.widgets?.find((candidate) => candidate.name === WIDGET);
  if (!widget) {
    widget = node.addWidget("text", WIDGET, "", () => {}, { serialize: false });
    widget.serialize = false; // neither in the saved workflow nor in the queued graph
  }
  widget.value = text;
  node.setDirtyCanvas(true, true);
}

app.registerExtension({
  name: "PixArt.TokenCount",
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (nodeData.name !== "PixArtTextEncode") return;
    const onExecuted = nodeType.prototype.onExecuted;
    nodeType.prototype.onExecuted = function (output) {
      onExecuted?.apply(this, arguments);
      if (output?.text) showCount(this, [output.text].flat().join(" "));
    };
  },
});
