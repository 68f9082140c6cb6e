// The API key: asked for where the server wants one, and kept in this tab only.
import { byId } from "./dom.js";

const NAME = "orthrus-key";
let asking = null;

export const key = () => sessionStorage.getItem(NAME) ?? "";

/** Ask for a key. Resolves to whether there is one; those who ask meanwhile share the answer. */
export function askForKey(reason) {
  asking ??= new Promise((resolve) => {
    const dialog = byId("key-dialog");
    byId("key-reason").textContent = reason;
    byId("key").value = "";
    dialog.returnValue = "";
    byId("key-cancel").onclick = () => dialog.close();
    byId("key-form").onsubmit = (event) => {
      event.preventDefault();
      const given = byId("key").value.trim();
      if (!given) return;
      sessionStorage.setItem(NAME, given);
      byId("change-key").hidden = false;
      dialog.close("given");
    };
    dialog.onclose = () => {
      asking = null;
      resolve(dialog.returnValue === "given");
    };
    dialog.showModal();
  });
  return asking;
}

export function watchKey() {
  byId("change-key").hidden = !key();
  byId("change-key").onclick = async () => {
    if (await askForKey("The key that this tab uses from now on.")) location.reload();
  };
}
