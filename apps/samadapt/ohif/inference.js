// Asks the server's models for masks and puts them into OHIF's segmentation.

import { checkFits, showMask } from './masks.js';
import { readNrrd } from './nrrd.js';
import { request } from './server.js';
import * as viewer from './viewer.js';

const FORMAT = { result_extension: '.nrrd', result_dtype: 'uint8', result_compress: false };

/**
 * The reply to an inference of the shown series.
 * @param {string} model
 * @param {Object} params
 * @returns {Promise<{sizes: number[], voxels: Uint8Array, params: Object}>}
 */
async function infer(model, params) {
  const { SeriesInstanceUID: image } = viewer.shownSeries();
  const form = new FormData();
  form.set('params', JSON.stringify({ ...params, ...FORMAT }));
  const response = await request(`infer/${model}?image=${encodeURIComponent(image)}&output=all`, { method: 'POST', form });
  const parts = await response.formData();
  const mask = readNrrd(await parts.get('image').arrayBuffer());
  checkFits(mask.sizes, image);
  return { ...mask, params: JSON.parse(parts.get('params')) };
}

/**
 * Every learned structure in the whole volume: takes the mask's place, unless nothing was learned yet.
 * @returns {Promise<Object>} the reply's params, and `mask` where there is one
 */
export async function segmentAll() {
  const reply = await infer('samadapt', {});
  if (!reply.params.model_version) return reply.params;
  const names = new Map(Object.entries(reply.params.label_names).map(([name, value]) => [value, name]));
  return { ...reply.params, mask: showMask(reply.voxels, names) };
}

/**
 * One object by clicks: becomes the given structure, which loses what it had in the slice (2D) or volume (3D).
 * Other structures stay.
 */
export async function segmentObject(model, { foreground, background }, value, k) {
  const { voxels: found, params } = await infer(model, { foreground, background, label: viewer.structures().get(value) });
  const mask = viewer.voxels();
  const size = mask.length / viewer.maskVolume().dimensions[2];
  const [begin, end] = k === null ? [0, mask.length] : [k * size, (k + 1) * size];
  for (let n = begin; n < end; n++) {
    if (mask[n] === value) mask[n] = 0;
    if (found[n] && !mask[n]) mask[n] = value;
  }
  viewer.setVoxels(mask);
  return params;
}
