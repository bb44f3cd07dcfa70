// Clicks on an object: the server's click models mark it, in the clicked slice or through the volume.

import { button, element } from './dom.js';
import { segmentObject } from './inference.js';
import * as viewer from './viewer.js';

const MODELS = { 'Click: slice': 'samadapt_click', 'Click: 3D': 'samadapt_click_3d' };

/**
 * Two switches. While one is on, a click in an image marks the object there, a click with Shift says what is not part
 * of it, and all clicks on one slice (2D) or in the volume (3D) count together until the switch or the structure changes.
 * @param {function(): number} structure the value to draw with
 */
export function pointer(structure, status) {
  const clicks = new Clicks(structure, status);
  const row = element('div', { className: 'samadapt-row', role: 'group', 'aria-label': 'Clicks' });
  for (const [text, model] of Object.entries(MODELS)) {
    const made = button(text, async () => {
      clicks.use(clicks.model === model ? null : model);
      for (const other of row.children) other.setAttribute('aria-pressed', String(other === made && clicks.model === model));
      if (clicks.model) status.say('Click on the object; with Shift: on what is not part of it. Press again to end.');
    });
    made.setAttribute('aria-pressed', 'false');
    row.append(made);
  }
  document.addEventListener('mousedown', (event) => clicks.take(event), true);
  return row;
}

class Clicks {
  constructor(structure, status) {
    this.structure = structure;
    this.status = status;
    this.model = null;
    this.busy = false;
    this.forget();
  }

  use(model) {
    this.model = model;
    this.forget();
  }

  forget() {
    this.foreground = [];
    this.background = [];
    this.value = null;
  }

  /** Take a click in an image away from OHIF's tools. */
  take(event) {
    const voxel = this.model && event.button === 0 ? viewer.voxelAt(event) : null;
    if (!voxel) return;
    event.preventDefault();
    event.stopImmediatePropagation();
    if (this.busy) return;
    this.add(voxel, event.shiftKey);
    this.run(voxel).catch(this.status.fail);
  }

  add(voxel, outside) {
    if (this.value !== this.structure()) this.forget();
    this.value = this.structure();
    (outside ? this.background : this.foreground).push(voxel);
  }

  async run([, , k]) {
    if (!this.value) throw new Error('add a structure first: the object needs a name');
    const flat = this.model === 'samadapt_click';
    const here = (points) => (flat ? points.filter((point) => point[2] === k) : points);
    const prompts = { foreground: here(this.foreground), background: here(this.background) };
    this.busy = true;
    this.status.say('The model looks …');
    try {
      const { message } = await segmentObject(this.model, prompts, this.value, flat ? k : null);
      this.status.say(message || 'Done.');
    } finally {
      this.busy = false;
    }
  }
}
