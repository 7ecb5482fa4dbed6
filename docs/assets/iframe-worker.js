// Browsers start no worker from a file: address. There, the script of the search worker runs in a hidden frame, so that
// search also works in a site that is opened from disk.
"use strict";
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      document.body.append(this.frame);
      const inner = this.frame.contentDocument;
      inner.open();
      inner.write("<!doctype html><title>Search</title><body></body>");
      inner.close();
      const scope = this.frame.contentWindow;
      const load = (source) => new Promise((resolve, reject) => {
        const script = inner.createElement("script");
        script.onload = resolve;
        script.onerror = () => reject(new Error(`cannot load ${source}`));
        script.src = source;
        inner.body.append(script);
      });
      scope.importScripts = (...sources) => sources.reduce((done, source) => done.then(() => load(source)), Promise.resolve());
      scope.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
      this.scope = scope;
      this.ready = load(new URL(url, location).href);
    }

    postMessage(data) {
      this.ready.then(() => this.scope.dispatchEvent(new MessageEvent("message", { data })));
    }

    terminate() {
      this.frame.remove();
    }
  };
}
