"""One case of the demo cohort: a different head, seen by a different scan.

The head is the template under a smooth random deformation (other ventricles, other proportions, left unlike right);
the scan has its own contrast, slice thickness, field of view, pose, bias field, noise, number type and axis order.
"""

from dataclasses import dataclass
from functools import lru_cache

import nibabel as nib
import numpy as np
from anatomy import CSF, GREY, LABELS, WHITE, Anatomy
from scipy import ndimage
from scipy.spatial.transform import Rotation

# Relative signal of fluid, grey and white matter. The last digit varies from case to case (`draw_scan`).
CONTRASTS: dict[str, tuple[float, float, float]] = {
    "T1": (0.20, 0.62, 0.90),
    "T1 flat": (0.30, 0.66, 0.82),
    "T2": (1.00, 0.58, 0.40),
}
# Read down the columns: every trait has another period, so that already the first cases differ in all of them.
_CONTRAST = ("T1", "T1 flat", "T2", "T1", "T1 flat")
_AXES = ("RAS", "LPS", "LAS", "RAS", "SPL", "LPI", "PIR")
_DTYPE = ("int16", "uint16", "uint8", "int16", "float32", "uint16")
_LESIONS = (0.0, 0.0, 0.6, 0.0, 0.0, 1.0)
_OBLIQUE = (0.0, 0.0, 0.0, 1.0)
_FULL_SCALE = {"uint8": 230.0, "int16": 900.0, "uint16": 3200.0, "float32": 1.0}

SUBSAMPLES = (2, 2, 3)  # points per voxel along each axis; their mean gives the partial volume effect
FIELD_STEP = 4.0  # mm between the points of the deformation field
HULL_STEP = 2  # mm between the points of the map of distances to the brain
WALL_REACH = 28  # mm around the ventricles within which distances to them are known


@dataclass(frozen=True)
class Scan:
    """What makes one case different from the others (lengths in mm, angles in degrees).

    Attributes:
        shape, spacing: of the stored voxel grid before `axes` reorders it: right, anterior, superior.
        centre: MNI position of the grid's centre.
        tilt: rotation of the scan's axes about right, anterior and superior (an oblique affine).
        pose: rotation of the head in the scanner, likewise.
        scale: head size along the three axes, 1 = template.
        bend: root mean square of the coarse and the fine part of the random deformation.
        ventricles: outward shift of the wall of the right and the left lateral ventricle.
        levels: signal of fluid, grey and white matter.
        margin: fluid kept around the brain by the brain extraction.
        lesions: load of white-matter lesions, 0 = none.
        bias: peak of the bias field, as a share of the signal.
        noise: standard deviation of the Rician noise, as a share of white matter.
        blur: in-plane blur in voxels.
        axes: three-letter axis code of the stored array.
        seed: of everything random in this case.
    """

    contrast: str
    levels: tuple[float, float, float]
    gamma: float
    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    centre: tuple[float, float, float]
    tilt: tuple[float, float, float]
    pose: tuple[float, float, float]
    scale: tuple[float, float, float]
    bend: tuple[float, float]
    ventricles: tuple[float, float]
    margin: float
    lesions: float
    bias: float
    noise: float
    blur: float
    axes: str
    dtype: str
    seed: int


def draw_scan(index: int, seed: int) -> Scan:
    """The traits of case ``index`` (0, 1, ...) of the cohort ``seed``; they do not depend on the number of cases."""
    rng = np.random.default_rng([seed, index])

    def uniform(low: float, high: float) -> float:
        return round(float(rng.uniform(low, high)), 3)

    def three(spread: float, middle: float = 0.0) -> tuple[float, float, float]:
        return (
            uniform(middle - spread, middle + spread),
            uniform(middle - spread, middle + spread),
            uniform(middle - spread, middle + spread),
        )

    contrast = _CONTRAST[index % len(_CONTRAST)]
    fluid, grey, white = (level * uniform(0.92, 1.08) for level in CONTRASTS[contrast])
    in_plane, thickness = uniform(2.1, 2.6), uniform(3.6, 5.0)
    bottom, top = uniform(-76.0, -64.0), uniform(34.0, 80.0)
    slices = int(np.clip(round((top - bottom) / thickness), 20, 32))
    growth, imbalance = uniform(-0.4, 3.6), uniform(-0.8, 0.8)
    oblique = _OBLIQUE[index % len(_OBLIQUE)]
    return Scan(
        contrast=contrast,
        levels=(round(fluid, 3), round(grey, 3), round(white, 3)),
        gamma=uniform(0.8, 1.25),
        shape=(int(np.ceil(172 / in_plane / 4)) * 4, int(np.ceil(204 / in_plane / 4)) * 4, slices),
        spacing=(in_plane, in_plane, thickness),
        centre=(uniform(-5, 5), uniform(-21, -13), round(bottom + slices * thickness / 2, 3)),
        tilt=tuple(oblique * angle for angle in three(10.0)),  # type: ignore[arg-type]
        pose=three(7.0),
        scale=three(0.07, 0.99),
        bend=(uniform(2.0, 3.4), uniform(0.8, 1.4)),
        ventricles=(growth + imbalance, growth - imbalance),
        margin=uniform(0.0, 2.0),
        lesions=_LESIONS[index % len(_LESIONS)],
        bias=uniform(0.1, 0.4),
        noise=uniform(0.015, 0.05),
        blur=uniform(0.0, 0.6),
        axes=_AXES[index % len(_AXES)],
        dtype=_DTYPE[index % len(_DTYPE)],
        seed=int(rng.integers(2**31)),
    )


def acquire(anatomy: Anatomy, scan: Scan) -> tuple[nib.Nifti1Image, nib.Nifti1Image]:
    """Image and true labels (uint8, values of ``labels.json``) of one case, on the same grid and affine."""
    rng = np.random.default_rng(scan.seed)
    affine = _scan_affine(scan)
    where = _template_positions(anatomy, scan, affine, rng)
    labels = _sample_labels(anatomy, where, scan.shape)
    signal = _signal(anatomy, scan, where, rng)
    image = _store(_disturb(signal, scan, rng), scan.dtype)
    return _as_nifti(image, affine, scan.axes), _as_nifti(labels, affine, scan.axes)


def _scan_affine(scan: Scan) -> np.ndarray:
    """Voxel (right, anterior, superior) to world, 4 x 4."""
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", scan.tilt, degrees=True).as_matrix() * scan.spacing
    affine[:3, 3] = np.array(scan.centre) - affine[:3, :3] @ ((np.array(scan.shape) - 1) / 2)
    return affine


def _template_positions(anatomy: Anatomy, scan: Scan, affine: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Template voxel positions (3, I*a, J*b, K*c) of the sub-samples of every scan voxel, SUBSAMPLES = (a, b, c)."""
    steps = [(np.arange(n * s) + 0.5) / s - 0.5 for n, s in zip(scan.shape, SUBSAMPLES, strict=True)]
    voxels = np.stack(np.meshgrid(*steps, indexing="ij")).astype(np.float32)
    head = np.diag(1 / np.array(scan.scale)) @ Rotation.from_euler("xyz", scan.pose, degrees=True).as_matrix()
    centre = np.array([0.0, -18.0, 0.0])
    matrix = head @ affine[:3, :3]
    offset = head @ (affine[:3, 3] - centre) + centre - anatomy.origin
    positions = np.tensordot(matrix.astype(np.float32), voxels, axes=1)
    positions += offset.astype(np.float32)[:, None, None, None]
    field = _deformation(anatomy, scan, rng)
    knots = positions / FIELD_STEP
    for axis in range(3):
        positions[axis] += ndimage.map_coordinates(field[axis], knots, order=1, mode="nearest")
    return positions


def _deformation(anatomy: Anatomy, scan: Scan, rng: np.random.Generator) -> np.ndarray:
    """Shift (3, i, j, k) in template voxels on a grid of FIELD_STEP: smooth bending, then the ventricle walls."""
    grid = [np.arange(0, n + FIELD_STEP, FIELD_STEP, dtype=np.float32) for n in anatomy.t1.shape]
    knots = np.stack(np.meshgrid(*grid, indexing="ij"))
    shift = np.zeros_like(knots)
    for amount, width in zip(scan.bend, (24.0, 10.0), strict=True):
        for axis in range(3):
            shift[axis] += amount * _smooth_noise(knots.shape[1:], width / FIELD_STEP, rng)
    wall, outward = _ventricle_wall(anatomy)
    bent = knots + shift
    distance = ndimage.map_coordinates(wall, bent, order=1, mode="nearest")
    right = 1 / (1 + np.exp(-(bent[0] + anatomy.origin[0]) / 4))
    growth = scan.ventricles[0] * right + scan.ventricles[1] * (1 - right)
    growth *= np.exp(-((distance / 14.0) ** 2))
    for axis in range(3):
        shift[axis] -= growth * ndimage.map_coordinates(outward[axis], bent, order=1, mode="nearest")
    return shift


@lru_cache(maxsize=1)
def _ventricle_wall(anatomy: Anatomy) -> tuple[np.ndarray, np.ndarray]:
    """Signed distance to the wall of the lateral ventricles in mm (negative inside), and its gradient (3, ...).

    Beyond WALL_REACH the distance is capped: nothing asks for it there.
    """
    inside = anatomy.labels == LABELS["lateral_ventricles"]
    near = tuple(
        slice(max(side.start - WALL_REACH, 0), side.stop + WALL_REACH) for side in ndimage.find_objects(inside)[0]
    )
    distance = np.full(inside.shape, WALL_REACH, dtype=np.float32)
    outside = ndimage.distance_transform_edt(~inside[near])
    distance[near] = np.minimum(outside - ndimage.distance_transform_edt(inside[near]), WALL_REACH)
    distance = ndimage.gaussian_filter(distance, 1.5)
    return distance, np.stack(np.gradient(distance))


def _sample_labels(anatomy: Anatomy, where: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """The label that most sub-samples of each voxel carry."""
    fine = ndimage.map_coordinates(anatomy.labels, where, order=0)
    share = np.stack([_voxel_mean((fine == value).astype(np.float32), shape) for value in range(len(LABELS) + 1)])
    return share.argmax(axis=0).astype(np.uint8)


def _signal(anatomy: Anatomy, scan: Scan, where: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Noise-free signal (I, J, K), 0 outside the extracted brain."""
    fluid, grey, white = scan.levels
    kept = ndimage.map_coordinates(_brain_distance(anatomy), where / HULL_STEP, order=1, mode="nearest") < scan.margin
    t1 = ndimage.map_coordinates(_filled(anatomy), where, order=1, mode="nearest")
    tissue = np.interp(t1, (CSF, GREY, WHITE, 1.0), (fluid, grey, white, white + 0.3 * (white - grey)))
    if scan.lesions:
        damage = ndimage.map_coordinates(_lesions(anatomy, scan.lesions, rng), where, order=1)
        tissue += damage * (0.6 * grey + 0.4 * fluid - tissue)
    tissue *= 1 + 0.03 * ndimage.zoom(_smooth_noise(scan.shape, 1.2, rng), SUBSAMPLES, order=1)
    return _voxel_mean((tissue * kept).astype(np.float32), scan.shape)


@lru_cache(maxsize=1)
def _filled(anatomy: Anatomy) -> np.ndarray:
    """The T1 template with fluid where there is no brain."""
    return np.where(anatomy.t1 > CSF, anatomy.t1, np.float32(CSF))


@lru_cache(maxsize=1)
def _brain_distance(anatomy: Anatomy) -> np.ndarray:
    """Distance in mm to the brain with its furrows closed, 0 or less inside, on a grid of HULL_STEP."""
    reach = 5  # points; furrows up to twice as wide are closed
    brain = np.pad(anatomy.t1[::HULL_STEP, ::HULL_STEP, ::HULL_STEP] > CSF, reach)
    hull = ndimage.distance_transform_edt(ndimage.distance_transform_edt(~brain) < reach) > reach
    distance = ndimage.distance_transform_edt(~(hull | brain)) - 0.5
    return HULL_STEP * distance[reach:-reach, reach:-reach, reach:-reach].astype(np.float32)


def _lesions(anatomy: Anatomy, load: float, rng: np.random.Generator) -> np.ndarray:
    """Share of damaged tissue, 0..1: patches in the white matter, most of them near the ventricles."""
    wall, _ = _ventricle_wall(anatomy)
    patches = _smooth_noise(anatomy.t1.shape, 3.2, rng) + 0.9 * np.exp(-np.maximum(wall, 0) / 10)
    depth = np.clip((patches - (2.3 - 0.5 * load)) * 3, 0, 1) * np.clip(2 * anatomy.white - 1, 0, 1)
    hindbrain = np.arange(anatomy.t1.shape[2]) + anatomy.origin[2] < 0
    return np.where(hindbrain, 0, depth * (wall > 0)).astype(np.float32)


def _smooth_noise(shape: tuple[int, ...], width: float, rng: np.random.Generator) -> np.ndarray:
    """Gaussian noise of mean 0 and standard deviation 1, smooth over ``width`` grid points."""
    noise = ndimage.gaussian_filter(rng.standard_normal(shape, dtype=np.float32), width, mode="wrap")
    return (noise - noise.mean()) / noise.std()


def _voxel_mean(fine: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """Mean over the sub-samples of each voxel: (I*a, J*b, K*c) -> (I, J, K)."""
    (i, j, k), (a, b, c) = shape, SUBSAMPLES
    return fine.reshape(i, a, j, b, k, c).mean(axis=(1, 3, 5))


def _disturb(signal: np.ndarray, scan: Scan, rng: np.random.Generator) -> np.ndarray:
    """Blur, bias field, contrast curve and Rician noise; the background of the extracted brain stays 0."""
    inside = signal > 0.5 * min(scan.levels)
    signal = ndimage.gaussian_filter(signal, (scan.blur, scan.blur, 0))
    axes = np.meshgrid(*(np.linspace(-1, 1, n) for n in signal.shape), indexing="ij", sparse=True)
    bias = sum(rng.normal() * a + 0.6 * rng.normal() * a * b for a, b in zip(axes, axes[1:] + axes[:1], strict=True))
    bias = bias / np.abs(np.broadcast_to(bias, signal.shape)[inside]).max()
    signal = signal**scan.gamma * np.exp(scan.bias * bias)
    strength = scan.noise * max(scan.levels)
    noisy = np.hypot(signal + rng.normal(0, strength, signal.shape), rng.normal(0, strength, signal.shape))
    return np.where(inside, noisy, 0)


def _store(signal: np.ndarray, dtype: str) -> np.ndarray:
    """Scale to the usual range of ``dtype``; floats keep 10 bits, which is what such a scan carries."""
    scaled = signal / np.percentile(signal[signal > 0], 99.5) * _FULL_SCALE[dtype]
    if np.issubdtype(np.dtype(dtype), np.integer):
        return np.clip(np.rint(scaled), 0, np.iinfo(dtype).max).astype(dtype)
    return (np.rint(scaled * 1024) / 1024).astype(dtype)


def _as_nifti(array: np.ndarray, affine: np.ndarray, axes: str) -> nib.Nifti1Image:
    """Reorder the array (right, anterior, superior) to ``axes``; the anatomy stays where it is in the world."""
    turn = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(axes))
    stored = nib.orientations.apply_orientation(array, turn)
    turned = affine @ nib.orientations.inv_ornt_aff(turn, array.shape)
    image = nib.Nifti1Image(np.ascontiguousarray(stored), turned)
    image.set_qform(turned, code="scanner")
    image.set_sform(turned, code="scanner")
    image.header.set_xyzt_units("mm")
    return image
