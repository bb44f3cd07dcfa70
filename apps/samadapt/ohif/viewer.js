// Everything that is OHIF's or cornerstone's: the series shown, its segmentation, tools and places.

import { sameName } from './names.js';

/** The bundled MONAI Label panel keeps its masks in the segmentation of this id. */
export const SEGMENTATION = '1';

/** Colours that are easily told apart, for structures whose own are not; red, green, blue. */
const PALETTE = [
  [230, 60, 60], [70, 130, 240], [250, 210, 50], [60, 190, 90], [240, 130, 40], [170, 90, 220],
  [70, 220, 220], [240, 90, 200], [190, 230, 90], [160, 110, 60], [150, 170, 250], [250, 180, 170],
];
const ALIKE = 90; // of 441, the distance from black to white

const TOOL_GROUPS = ['mpr', 'default'];
const services = () => window.services;

/** Whether a series is on the screen. */
export function ready() {
  return Boolean(services() && window.cornerstone && shownSeries() && imageVolume());
}

/** @returns {?{StudyInstanceUID: string, SeriesInstanceUID: string, Modality: string}} of the active viewport */
export function shownSeries() {
  const { viewports, activeViewportId } = services().viewportGridService.getState();
  const uid = viewports.get(activeViewportId)?.displaySetInstanceUIDs?.[0];
  return (uid && services().displaySetService.getDisplaySetByUID(uid)) || null;
}

/** The volume of the active viewport; null for a series that OHIF cannot show as one. */
export function imageVolume() {
  const { activeViewportId } = services().viewportGridService.getState();
  const id = services().cornerstoneViewportService.getCornerstoneViewport(activeViewportId)?.getVolumeId?.();
  return (id && window.cornerstone.cache.getVolume(id)) || null;
}

function segmentation() {
  return services().segmentationService.getSegmentation(SEGMENTATION) || null;
}

/** The mask's volume; null before the bundled panel has made it. */
export function maskVolume() {
  return segmentation() ? services().segmentationService.getLabelmapVolume(SEGMENTATION) : null;
}

/** Whether the mask belongs to the series on the screen. */
export function maskFits() {
  const data = segmentation()?.representationData?.Labelmap;
  return Boolean(data && imageVolume() && data.referencedVolumeId === imageVolume().volumeId);
}

/** A copy of the mask's voxels (i fastest, then j, then k). */
export function voxels() {
  return Uint8Array.from(maskVolume().voxelManager.getCompleteScalarDataArray());
}

/** Show another mask; whoever listens is told, the bundled panel and the viewports included. */
export function setVoxels(values) {
  maskVolume().voxelManager.setCompleteScalarDataArray(values);
  tellModified();
}

function tellModified() {
  window.cornerstone.triggerEvent(window.cornerstone.eventTarget, window.cornerstoneTools.Enums.Events.SEGMENTATION_DATA_MODIFIED, {
    segmentationId: SEGMENTATION,
  });
}

/** Call `listener` whenever the mask has changed, by whatever means. */
export function whenMaskChanges(listener) {
  const event = window.cornerstoneTools.Enums.Events.SEGMENTATION_DATA_MODIFIED;
  window.cornerstone.eventTarget.addEventListener(event, ({ detail }) => {
    if (detail.segmentationId === SEGMENTATION) listener();
  });
}

/** SOPInstanceUID of each slice in the order of k; null where slices are frames of one object. */
export function sliceUids() {
  const uids = imageVolume().imageIds.map((id) => window.cornerstone.metaData.get('instance', id)?.SOPInstanceUID);
  return uids.every(Boolean) && new Set(uids).size === uids.length ? uids : null;
}

// ---- structures

/** @returns {Map<number, string>} voxel value -> name of the structures that have one */
export function structures() {
  const own = segmentation();
  const found = new Map();
  for (const source of [own?.segments, own?.config?.segments]) {
    for (const segment of Object.values(source || {})) {
      if (segment?.label && !isPlaceholder(segment)) found.set(segment.segmentIndex, segment.label);
    }
  }
  return new Map([...found].sort((a, b) => a[0] - b[0]));
}

let held = { image: null, names: new Map() };

/**
 * Keep the name of every value. Connecting again numbers the bundled panel's structures anew, in alphabetical order,
 * while the voxels stay as they are; so names that a value had are given back, and names that are new get free values.
 */
export function keepNames() {
  const own = segmentation();
  const image = own?.representationData?.Labelmap?.referencedVolumeId;
  if (!image) return;
  if (held.image !== image) held = { image, names: new Map() };
  const found = structures();
  for (const [value, name] of found) {
    if (held.names.get(value) === name || [...held.names.values()].includes(name)) continue;
    held.names.set(held.names.has(value) ? firstFree(held.names) : value, name);
  }
  if (![...held.names].every(([value, name]) => found.get(value) === name)) nameAll(own, held.names);
}

function nameAll(own, names) {
  const colors = new Map(Object.values(own.config?.segments || {}).map(({ label, color }) => [label, color]));
  own.config = { ...own.config, segments: {} };
  for (const [value, label] of names) {
    own.config.segments[value] = { segmentIndex: value, label, color: colors.get(label) };
    if (own.segments[value]) own.segments[value].label = label;
    else services().segmentationService.addSegment(SEGMENTATION, { segmentIndex: value, label });
  }
}

/** The bundled panel colours by name, and may give two structures nearly the same: the later one gets another. */
function tellApart(segments) {
  const taken = [];
  for (const segment of segments) {
    if (taken.some((color) => alike(color, segment.color))) {
      const other = PALETTE.find((color) => !taken.some((one) => alike(one, color)));
      if (other) segment.color = [...other, ...segment.color.slice(3)];
    }
    taken.push(segment.color);
  }
}

function alike(one, other) {
  return Math.hypot(...[0, 1, 2].map((channel) => one[channel] - other[channel])) < ALIKE;
}

/** The same colours in every view; the bundled panel gives its own to the active view alone. */
export function shareColors() {
  const service = services().segmentationService;
  const colored = Object.values(segmentation()?.config?.segments || {}).filter(({ color }) => color);
  tellApart(colored);
  for (const viewport of service.getViewportIdsWithSegmentation(SEGMENTATION)) {
    for (const { segmentIndex, color } of colored) {
      const shown = service.getSegmentColor(viewport, SEGMENTATION, segmentIndex);
      if ([...shown].join() !== [...color].join()) service.setSegmentColor(viewport, SEGMENTATION, segmentIndex, color);
    }
  }
}

/** OHIF makes a nameless first segment where there are no labels. */
function isPlaceholder(segment) {
  return segment.label === `Segment ${segment.segmentIndex}`;
}

/** The value of the structure of this name, however it is written; null if there is none. */
export function structureNamed(name) {
  for (const [value, known] of structures()) if (sameName(known) === sameName(name)) return value;
  return null;
}

/** The value of a structure; it is added if there is none of this name. */
export function addStructure(name) {
  const there = structureNamed(name);
  if (there !== null) return there;
  const own = segmentation();
  const value = firstFree(structures());
  services().segmentationService.addSegment(SEGMENTATION, { segmentIndex: value, label: name });
  own.config = own.config || {};
  own.config.segments = own.config.segments || {}; // where the bundled panel looks names up
  const color = services().segmentationService.getSegmentColor(activeViewportId(), SEGMENTATION, value);
  own.config.segments[value] = { segmentIndex: value, label: name, color };
  keepNames();
  return value;
}

/** Take a structure out of the list; its voxels, if it has any, become background. */
export function removeStructure(value) {
  held.names.delete(value);
  delete segmentation().config?.segments?.[value];
  services().segmentationService.removeSegment(SEGMENTATION, value);
}

function firstFree(taken) {
  for (let value = 1; value < 255; value++) if (!taken.has(value)) return value;
  throw new Error('there are 254 structures already');
}

export function activeStructure() {
  return services().segmentationService.getActiveSegment(activeViewportId())?.segmentIndex ?? null;
}

export function setActiveStructure(value) {
  services().segmentationService.setActiveSegment(SEGMENTATION, value);
}

function activeViewportId() {
  return services().viewportGridService.getState().activeViewportId;
}

// ---- tools and places

/** Give the left mouse button to a tool. */
export function useTool(toolName) {
  for (const toolGroupId of TOOL_GROUPS) {
    window.commandsManager.runCommand('setToolActive', { toolName, toolGroupId }, 'CORNERSTONE');
  }
}

/** Radius of brush and eraser in mm. */
export function setBrushSize(millimetres) {
  window.commandsManager.runCommand('setBrushSize', {
    value: millimetres,
    toolNames: ['CircularBrush', 'CircularEraser'],
  });
}

/** Show slice k in every view. */
export function jumpToSlice(k) {
  const { imageData, dimensions } = imageVolume();
  for (const viewport of volumeViewports()) {
    const index = imageData.worldToIndex(viewport.getCamera().focalPoint);
    const inside = [0, 1].map((axis) => Math.min(Math.max(index[axis], 0), dimensions[axis] - 1));
    viewport.jumpToWorld(imageData.indexToWorld([...inside, k]));
    viewport.render();
  }
}

/** The number that OHIF shows for slice k: it counts from 1, in views from the feet or from behind from the far end. */
export function sliceNumber(k) {
  const { dimensions, direction } = imageVolume();
  const along = [...direction].slice(6, 9);
  const towards = (viewport) => viewport.getCamera().viewPlaneNormal.reduce((sum, x, n) => sum + x * along[n], 0);
  const view = volumeViewports().map(towards).find((dot) => Math.abs(dot) > 0.9);
  return view < 0 ? dimensions[2] - k : k + 1;
}

/** The slice k that the active view shows (its centre, where the view cuts through slices). */
export function shownSlice() {
  const viewport = services().cornerstoneViewportService.getCornerstoneViewport(activeViewportId());
  return Math.round(imageVolume().imageData.worldToIndex(viewport.getCamera().focalPoint)[2]);
}

function volumeViewports() {
  const id = imageVolume().volumeId;
  const all = window.cornerstone.getRenderingEngines().flatMap((engine) => engine.getViewports());
  return all.filter((viewport) => viewport.jumpToWorld && viewport.hasVolumeId?.(id));
}

/** Address of a series in the MONAI Label mode, which shows a study's first series unless it is given no other. */
export function addressOf(study, series) {
  const address = new URL(`${window.PUBLIC_URL || '/ohif/'}monai-label`, window.location.origin);
  address.searchParams.set('StudyInstanceUIDs', study);
  address.searchParams.set('SeriesInstanceUIDs', series);
  return address;
}

/** The voxel [i, j, k] under a pointer event; null outside of images. */
export function voxelAt(event) {
  const element = event.target.closest?.('.cornerstone-viewport-element');
  const enabled = element && window.cornerstone.getEnabledElement(element);
  if (!enabled || !maskFits() || event.target.closest('button')) return null;
  const { left, top } = element.getBoundingClientRect();
  const { imageData, dimensions } = imageVolume();
  const world = enabled.viewport.canvasToWorld([event.clientX - left, event.clientY - top]);
  const voxel = imageData.worldToIndex(world).map(Math.round);
  return voxel.every((index, axis) => index >= 0 && index < dimensions[axis]) ? voxel : null;
}
