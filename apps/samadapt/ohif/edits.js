// Which slices somebody has changed since the label was submitted last, apart from what a model put there.

let baseline = new Uint8Array(0);
let edited = [];

/** From here on, changes count from these voxels. */
export function startFrom(voxels) {
  baseline = voxels;
  edited = [];
}

/** What changes count from, to return to it. */
export function mark() {
  return { baseline, edited };
}

/** @param {Object} marked from `mark` */
export function returnTo(marked) {
  ({ baseline, edited } = marked);
}

/** A model's mask has come: it is no edit, except in slices that somebody had changed before. */
export function takeModelMask(voxels, dimensions) {
  const size = dimensions[0] * dimensions[1];
  const before = comparable(voxels);
  const next = Uint8Array.from(voxels);
  for (const k of edited) next.set(before.subarray(k * size, (k + 1) * size), k * size);
  baseline = next;
}

/**
 * @param {Uint8Array} voxels the mask of now
 * @param {number[]} dimensions of the mask, [I, J, K]
 * @returns {number[]} every k in which a voxel differs from the baseline; without one, every k that is not empty
 */
export function editedSlices(voxels, dimensions) {
  const size = dimensions[0] * dimensions[1];
  const before = comparable(voxels);
  const differs = (k) => {
    for (let n = k * size; n < (k + 1) * size; n++) if (voxels[n] !== before[n]) return true;
    return false;
  };
  edited = [...Array(dimensions[2]).keys()].filter(differs);
  return edited;
}

function comparable(voxels) {
  return baseline.length === voxels.length ? baseline : new Uint8Array(voxels.length);
}

const BUNDLED_SEGMENTS = /\/infer\/samadapt\?/;

/**
 * Call `listener` when the bundled panel has fetched a mask of the whole volume; it shows it right afterwards.
 * That panel offers no event for this, but its requests are XMLHttpRequests and ours are not.
 */
export function whenBundledFetches(listener) {
  const observer = new PerformanceObserver((list) => {
    const its = (entry) => entry.initiatorType === 'xmlhttprequest' && BUNDLED_SEGMENTS.test(entry.name);
    if (list.getEntries().some(its)) listener();
  });
  observer.observe({ type: 'resource' });
}
