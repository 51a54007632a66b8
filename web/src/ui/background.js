/** Calls to a worker as promises. */

export class Background {
  #calls = new Map();
  #next = 0;
  #worker;

  /**
   * @param {string} url of the worker's program
   * @param {object} start first message: facts of the model and assets
   */
  constructor(url, start) {
    this.#worker = new Worker(url);
    this.#worker.onmessage = ({ data }) => this.#receive(data);
    this.#worker.onerror = () => this.#fail("the page's program could not run in this browser");
    this.call("start", start);
  }

  /**
   * Run one of the worker's handlers.
   * @param {(text: string) => void} [progress]
   * @returns {Promise<any>} rejected with an `Error` whose message is for the user
   */
  call(kind, content, progress = () => {}) {
    const id = this.#next++;
    this.#worker.postMessage({ id, kind, content });
    return new Promise((resolve, reject) => this.#calls.set(id, { resolve, reject, progress }));
  }

  #receive({ id, result, error, progress }) {
    const call = this.#calls.get(id);
    if (!call) return;
    if (progress) return call.progress(progress);
    this.#calls.delete(id);
    if (error) call.reject(new Error(error));
    else call.resolve(result);
  }

  #fail(message) {
    for (const { reject } of this.#calls.values()) reject(new Error(message));
    this.#calls.clear();
  }
}
