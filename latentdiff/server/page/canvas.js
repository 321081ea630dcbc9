// The board: a picture, what was painted onto it, and a mask of what is to be drawn anew.

const canvasOf = (width, height) => {
  const canvas = document.createElement("canvas");
  canvas.width = width;
  canvas.height = height;
  return canvas;
};

export class Board {
  // `changed` is called after each stroke.
  constructor(canvas, changed) {
    this.canvas = canvas;
    this.changed = changed;
    this.tool = null;
    this.colour = "#d03030";
    this.width = 48; // of the brush, on a board of 512
    this.before = false;
    this.path = [];
    this.reset(512, 512);
    canvas.addEventListener("pointerdown", (event) => this.#down(event));
    canvas.addEventListener("pointermove", (event) => this.#move(event));
    for (const kind of ["pointerup", "pointercancel"]) {
      canvas.addEventListener(kind, () => this.#up());
    }
  }

  // An empty board: white, nothing to send.
  reset(width, height) {
    this.canvas.width = width;
    this.canvas.height = height;
    this.picture = canvasOf(width, height);
    this.mask = canvasOf(width, height);
    this.#whiten();
    this.opened = this.painted = this.masked = false;
    this.undone = [];
    this.showing = null; // a result or a preview, in place of the picture
    this.draw();
  }

  // A picture to edit, no larger than 1024 pixels a side.
  open(image) {
    const [w, h] = [image.naturalWidth, image.naturalHeight];
    const scale = Math.min(1, 1024 / Math.max(w, h));
    this.reset(Math.max(1, Math.round(w * scale)), Math.max(1, Math.round(h * scale)));
    const { width, height } = this.canvas;
    this.picture.getContext("2d").drawImage(image, 0, 0, width, height);
    this.opened = true;
    this.draw();
  }

  // What to send: nothing, or a picture, and a mask (white: drawn anew) if one was drawn.
  get image() {
    return this.opened || this.painted ? this.picture.toDataURL("image/png") : null;
  }

  get maskImage() {
    if (!this.masked) return null;
    const canvas = canvasOf(this.mask.width, this.mask.height);
    const context = canvas.getContext("2d");
    context.fillStyle = "black";
    context.fillRect(0, 0, canvas.width, canvas.height);
    context.filter = "brightness(0) invert(1)"; // the marks are shown in colour, and sent white
    context.drawImage(this.mask, 0, 0);
    return canvas.toDataURL("image/png");
  }

  show(image) {
    this.showing = image;
    this.draw();
  }

  clear() {
    this.#remember();
    this.mask.getContext("2d").clearRect(0, 0, this.mask.width, this.mask.height);
    this.masked = false;
    if (this.painted && !this.opened) {
      this.#whiten();
      this.painted = false;
    }
    this.draw();
    this.changed();
  }

  undo() {
    const last = this.undone.pop();
    if (!last) return;
    this.picture.getContext("2d").putImageData(last.picture, 0, 0);
    this.mask.getContext("2d").putImageData(last.mask, 0, 0);
    [this.painted, this.masked] = [last.painted, last.masked];
    this.draw();
    this.changed();
  }

  draw() {
    const context = this.canvas.getContext("2d");
    const { width, height } = this.canvas;
    const shown = this.before || !this.showing ? this.picture : this.showing;
    context.imageSmoothingQuality = "high";
    context.drawImage(shown, 0, 0, width, height);
    if (shown !== this.picture) return;
    context.globalAlpha = 0.55;
    context.drawImage(this.mask, 0, 0);
    context.globalAlpha = 1;
    if (this.tool === "lasso" && this.path.length > 1) {
      context.strokeStyle = "#d9512b";
      context.lineWidth = Math.max(2, width / 256);
      context.setLineDash([width / 64, width / 64]);
      context.stroke(this.#outline());
      context.setLineDash([]);
    }
  }

  #whiten() {
    const context = this.picture.getContext("2d");
    context.fillStyle = "white";
    context.fillRect(0, 0, this.picture.width, this.picture.height);
  }

  #remember() {
    const { width, height } = this.canvas;
    this.undone.push({
      picture: this.picture.getContext("2d").getImageData(0, 0, width, height),
      mask: this.mask.getContext("2d").getImageData(0, 0, width, height),
      painted: this.painted,
      masked: this.masked,
    });
    if (this.undone.length > 12) this.undone.shift();
  }

  // Where a pointer is, in pixels of the board, which is shown with its aspect kept.
  #place(event) {
    const box = this.canvas.getBoundingClientRect();
    const scale = Math.min(box.width / this.canvas.width, box.height / this.canvas.height);
    const left = box.left + (box.width - this.canvas.width * scale) / 2;
    const top = box.top + (box.height - this.canvas.height * scale) / 2;
    return [(event.clientX - left) / scale, (event.clientY - top) / scale];
  }

  #down(event) {
    if (!this.tool || event.button !== 0) return;
    this.canvas.setPointerCapture(event.pointerId);
    this.#remember();
    this.showing = null;
    this.path = [this.#place(event)];
    this.#extend();
  }

  #move(event) {
    if (!this.path.length) return;
    this.path.push(this.#place(event));
    this.#extend();
  }

  #up() {
    if (!this.path.length) return;
    if (this.tool === "lasso") {
      const context = this.mask.getContext("2d");
      context.fillStyle = "#d9512b";
      context.fill(this.#outline());
      this.masked = true;
    }
    this.path = [];
    this.draw();
    this.changed();
  }

  #extend() {
    if (this.tool !== "lasso") {
      const onto = this.tool === "brush" ? this.mask : this.picture;
      const context = onto.getContext("2d");
      const [x, y] = this.path.at(-2) ?? this.path.at(-1);
      context.strokeStyle = this.tool === "brush" ? "#d9512b" : this.colour;
      context.lineWidth = (this.width * this.canvas.width) / 512;
      context.lineCap = "round";
      context.beginPath();
      context.moveTo(x, y);
      context.lineTo(...this.path.at(-1));
      context.stroke();
      if (this.tool === "brush") this.masked = true;
      else this.painted = true;
    }
    this.draw();
  }

  #outline() {
    const outline = new Path2D();
    this.path.forEach(([x, y], index) => (index ? outline.lineTo(x, y) : outline.moveTo(x, y)));
    outline.closePath();
    return outline;
  }
}
