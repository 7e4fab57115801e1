// Adds an entry to the context menu of a selected text, and shows the label of the text on the extension's icon.

const PAGE = { url: "offscreen.html", reasons: ["WORKERS"], justification: "It runs the model in WebAssembly." };
let opening; // the page that runs the model, while it opens

async function openPage() {
  const pages = await chrome.runtime.getContexts({ contextTypes: ["OFFSCREEN_DOCUMENT"] });
  if (pages.length) return;
  opening ??= chrome.offscreen.createDocument(PAGE).finally(() => (opening = undefined));
  await opening;
}

/** Returns the label with the highest probability, and this probability. */
async function classify(text) {
  await openPage();
  const { answer, error } = await chrome.runtime.sendMessage({ text });
  if (error) throw new Error(error);
  return answer;
}

async function show(badge, title) {
  await chrome.action.setBadgeText({ text: badge });
  await chrome.action.setTitle({ title });
}

chrome.runtime.onInstalled.addListener(() => {
  chrome.contextMenus.create({ id: "classify", title: "Label the selected text", contexts: ["selection"] });
});

chrome.contextMenus.onClicked.addListener(async ({ selectionText }) => {
  try {
    const { label, score } = await classify(selectionText);
    await show(label.slice(0, 4), `${label} (${(100 * score).toFixed(1)} %): ${selectionText}`);
  } catch (error) {
    await show("!", `Error: ${error.message}`);
  }
});
