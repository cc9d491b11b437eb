// The page of tools/chat.py. Every text is set as textContent: what anybody writes is shown, never run.
"use strict";

const found = (id) => document.getElementById(id);
let about = { model: "", upload_bytes: Infinity, characters: Infinity };
let image = null; // base64 of the picture's file
let turns = []; // [question, answer] of this conversation
let running = null; // the AbortController of the question that is being answered

function notice(text) {
  found("notice").textContent = text;
  found("notice").hidden = !text;
}

function say(kind, text) {
  const item = document.createElement("li");
  item.className = kind;
  item.textContent = text;
  found("turns").append(item);
  item.scrollIntoView({ block: "end" });
  return item;
}

function begin() {
  if (running) running.abort();
  turns = [];
  found("turns").replaceChildren();
  notice("");
  found("question").focus();
}

async function take(file) {
  if (!file) return;
  begin();
  if (file.size > about.upload_bytes) {
    notice(`A picture's file may have ${Math.round(about.upload_bytes / 2 ** 20)} MiB; this one has ` +
      `${(file.size / 2 ** 20).toFixed(1)}.`);
    return;
  }
  const url = await new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  }).catch(() => null);
  if (url === null) {
    notice("The file cannot be read.");
    return;
  }
  image = url.slice(url.indexOf(",") + 1);
  const picture = found("picture");
  URL.revokeObjectURL(picture.src);
  picture.src = URL.createObjectURL(file);
  picture.hidden = false;
  found("hint").hidden = true;
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) yield JSON.parse(line);
  }
}

async function answer(question, item, signal) {
  const response = await fetch("/ask", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ question, earlier: turns, image }),
    signal,
  });
  if (!response.ok) throw new Error((await response.json()).error);
  for await (const event of events(response)) {
    if ("waiting" in event && event.waiting > 0) {
      item.classList.add("waiting");
      item.textContent = `${event.waiting} before you`;
    } else if ("waiting" in event) {
      item.classList.remove("waiting");
      item.textContent = "";
    } else if ("text" in event) {
      item.textContent += event.text;
      item.scrollIntoView({ block: "end" });
    } else if ("error" in event) {
      throw new Error(event.error);
    } else if ("done" in event) {
      return;
    }
  }
  throw new Error("The server went away in the middle of the answer.");
}

async function ask() {
  const question = found("question").value.trim();
  if (!question || running) return;
  notice("");
  const asked = say("asked", question), told = say("told", "");
  const mine = (running = new AbortController());
  const mark = turns;
  busy(true);
  found("question").value = "";
  let failed = null;
  try {
    await answer(question, told, mine.signal);
  } catch (error) {
    failed = error;
  }
  running = null;
  busy(false);
  if (turns !== mark) return; // another conversation has begun
  if (failed && (failed.name !== "AbortError" || told.classList.contains("waiting") || !told.textContent)) {
    asked.remove();
    told.remove();
    found("question").value = question;
    if (failed.name === "TypeError") notice("The server does not answer.");
    else if (failed.name !== "AbortError") notice(failed.message);
    return;
  }
  told.dataset.state = "done";
  turns.push([question, told.textContent]);
}

function busy(yes) {
  found("ask").hidden = yes;
  found("stop").hidden = !yes;
}

found("form").addEventListener("submit", (event) => { event.preventDefault(); ask(); });
found("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); ask(); }
});
found("stop").addEventListener("click", () => running && running.abort());
found("new").addEventListener("click", begin);
found("file").addEventListener("change", (event) => { take(event.target.files[0]); event.target.value = ""; });
found("picture").addEventListener("error", () => { found("picture").hidden = true; found("hint").hidden = false; });
document.addEventListener("dragover", (event) => { event.preventDefault(); found("drop").classList.add("over"); });
document.addEventListener("dragleave", () => found("drop").classList.remove("over"));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  found("drop").classList.remove("over");
  take(event.dataTransfer.files[0]);
});

fetch("/about").then((response) => response.json()).then((said) => {
  about = said;
  found("model").textContent = said.model;
});
