"""Labels over DICOMweb, with real PACSs: what is submitted is what training reads and what the PACS gets."""

import json
import shutil
import time

import numpy as np
import pydicom
import pytest
import requests
from dicomweb_client.api import DICOMwebClient
from pydicom.uid import generate_uid

from pacs import pacs
from phantoms import KINDS, octants, write_phantom
from samadapt.data.cases import find_cases
from samadapt.data.dicom import dicom_files, read_series, series_grid
from samadapt.data.dicom_seg import read_seg, write_seg
from samadapt.data.volume import Geometry, read_volume
from samadapt.errors import InputError, NotFoundError, UnavailableError
from samadapt.server.dicom_datastore import SafeDicomDatastore
from samadapt.server.pacs import check_uid

__all__ = ["pacs"]

NAMES = {"label_info": [{"name": "liver", "idx": 2}, {"name": "our own", "idx": 5}, {"name": "absent", "idx": 7}]}


def raw(path, mask):
    """As a browser sends it."""
    path.write_bytes(mask.ravel(order="F").tobytes())
    return str(path)


def store_of(pacs, tmp_path, name="cache"):
    return SafeDicomDatastore(DICOMwebClient(pacs.url), {"Modality": "CT"}, str(tmp_path / name))


def segs_of(pacs, image=None):
    client = DICOMwebClient(pacs.url)
    found = []
    for series in client.search_for_series(search_filters={"Modality": "SEG"}):
        found += client.retrieve_series(series["0020000D"]["Value"][0], series["0020000E"]["Value"][0])
    return [seg for seg in found if image in (None, seg.ReferencedSeriesSequence[0].SeriesInstanceUID)]


def test_every_kind_of_series_voxel_for_voxel(pacs, tmp_path):
    """From what a browser sends to what the training reads, and to what another program reads in the PACS."""
    study, uids = generate_uid(), {}
    for kind, how in KINDS.items():
        uids[kind] = generate_uid()
        folder = write_phantom(tmp_path / kind, how, SeriesInstanceUID=uids[kind], StudyInstanceUID=study)
        pacs.upload(folder)
    store = store_of(pacs, tmp_path)
    assert set(store.list_images()) == set(uids.values())
    for kind, uid in uids.items():
        series = read_series(tmp_path / kind)
        volume = read_volume(store.image_path(uid))
        assert (volume.array[0] == series.array).all()
        assert volume.geometry.matches(Geometry(series.array.shape, series.affine))
        assert volume.modality == series.modality
        store.save_label(uid, raw(tmp_path / "label.bin", octants(volume.geometry.shape)), "final", dict(NAMES))
    cases = {case.id: case for case in find_cases(store.folder)}
    for kind, uid in uids.items():
        mask = octants(read_series(tmp_path / kind).array.shape)
        case = cases[uid]
        from samadapt.data.volume import read_label

        assert (read_label(case.label, read_volume(case.image).geometry) == mask).all()
        assert case.values == {2: "liver", 5: "our own", 7: "absent"}
        assert case.patient == "P7"
        (seg,) = segs_of(pacs, uid)
        images = [pydicom.dcmread(path, stop_before_pixels=True) for path in dicom_files(tmp_path / kind)]
        back = read_seg(seg, series_grid(images, "here"))
        named = {name: value for value, name in back.values.items()}
        for name, value in (("liver", 2), ("our own", 5)):
            assert ((back.mask == named.get(name, 99)) == (mask == value)).all()
    assert not store.get_unlabeled_images()


def test_slices_in_any_order_are_told_by_their_names(pacs, tmp_path):
    uid = generate_uid()
    folder = write_phantom(tmp_path / "s", KINDS["axial"], SeriesInstanceUID=uid)
    pacs.upload(folder)
    store = store_of(pacs, tmp_path)
    store.image_path(uid)
    mask = octants(read_series(folder).array.shape)
    names = [name for name, _ in store.grid(uid).frames]
    file = raw(tmp_path / "l.bin", mask[:, :, ::-1])
    store.save_label(uid, file, "final", {**NAMES, "slices": names[::-1]})
    assert (np.asarray(read_volume(store.local_label(uid)).array[0]) == mask).all()
    for wrong in (names[:-1], [*names[:-1], "1.2.3"], "x", [names[0]] * len(names)):
        with pytest.raises(InputError):
            store.save_label(uid, file, "final", {**NAMES, "slices": wrong})
    with pytest.raises(InputError, match="bytes"):
        store.save_label(uid, raw(tmp_path / "l.bin", mask[:-1]), "final", dict(NAMES))


def test_counts_rise_and_both_annotators_labels_are_kept(pacs, tmp_path):
    uids = [generate_uid() for _ in range(2)]
    for n, uid in enumerate(uids):
        pacs.upload(write_phantom(tmp_path / str(n), KINDS["axial"], SeriesInstanceUID=uid))
    store = store_of(pacs, tmp_path)
    assert store.status()["completed"] == 0
    shape = read_volume(store.image_path(uids[0])).geometry.shape
    first, second = octants(shape), octants(shape)[::-1]
    store.save_label(uids[0], raw(tmp_path / "l.bin", first), "final", {**NAMES, "client_id": "ann"})
    store.save_label(uids[0], raw(tmp_path / "l.bin", second), "final", {**NAMES, "client_id": "bob"})
    assert any("ann" in remark for remark in store.last_saved.remarks)
    assert store.status() == {"total": 2, "completed": 1, "label_tags": {"final": 1}}
    assert store.get_unlabeled_images() == [uids[1]]
    served, former = store.label_versions(uids[0])
    assert (served.served, former.served) == (True, False)
    assert (served.info["client_id"], former.info["client_id"]) == ("bob", "ann")
    assert (read_volume(served.path).array[0] == second).all()
    assert (read_volume(former.path).array[0] == first).all()
    assert len(segs_of(pacs)) == 2


def test_an_empty_mask_counts_here_and_is_said_to_be_nothing_for_the_pacs(pacs, tmp_path):
    uid = generate_uid()
    pacs.upload(write_phantom(tmp_path / "s", KINDS["axial"], SeriesInstanceUID=uid))
    store = store_of(pacs, tmp_path)
    shape = read_volume(store.image_path(uid)).geometry.shape
    store.save_label(uid, raw(tmp_path / "l.bin", octants(shape)), "final", dict(NAMES))
    store.save_label(uid, raw(tmp_path / "l.bin", np.zeros(shape, np.uint8)), "final", dict(NAMES))
    assert any("no DICOM SEG" in remark for remark in store.last_saved.remarks)
    assert len(segs_of(pacs)) == 1
    store.forget_lists()
    store.datalist()
    assert not read_volume(store.get_label_uri(uid, "final")).array.any()


def test_labels_of_others_count_with_their_names_and_the_latest_wins(pacs, tmp_path):
    uid = generate_uid()
    folder = write_phantom(tmp_path / "s", KINDS["oblique"], SeriesInstanceUID=uid)
    pacs.upload(folder)
    images = [pydicom.dcmread(path, stop_before_pixels=True) for path in dicom_files(folder)]
    grid = series_grid(images, "here")
    mask = octants(grid.geometry.shape)

    def put(name, day, turned):
        seg = write_seg(turned, {2: name, 5: "x"}, grid, images)
        seg.ContentDate = day
        seg.save_as(tmp_path / "seg.dcm", write_like_original=False)
        pacs.upload([tmp_path / "seg.dcm"])

    put("middle", "20200101", mask)
    put("oldest", "20100101", mask[::-1])
    store = store_of(pacs, tmp_path)
    assert store.list_images() == [uid]
    assert store.get_labeled_images() == [uid]
    entry = store.json()["objects"][uid]["labels"]["final"]["info"]
    assert "middle" in [one["name"] for one in entry["label_info"]] or entry["label_info"]
    store.datalist()
    (case,) = find_cases(store.folder)
    assert case.values == {1: "middle", 2: "x"}
    assert (read_volume(case.label).array[0] == np.select([mask == 2, mask == 5], [1, 2])).all()
    put("latest", "20210101", mask[:, ::-1])
    store.forget_lists()
    store.datalist()
    (case,) = find_cases(store.folder)
    assert case.values == {1: "latest", 2: "x"}
    assert [v.info["label_info"][0]["name"] for v in store.label_versions(uid)] == ["latest", "middle", "oldest"]
    store.save_label(uid, raw(tmp_path / "l.bin", mask), "final", dict(NAMES))
    again = store_of(pacs, tmp_path)
    again.datalist()
    assert find_cases(again.folder)[0].values == {2: "liver", 5: "our own", 7: "absent"}


def test_a_lost_cache_is_made_again_from_the_pacs(pacs, tmp_path):
    uid = generate_uid()
    pacs.upload(write_phantom(tmp_path / "s", KINDS["sagittal"], SeriesInstanceUID=uid))
    store = store_of(pacs, tmp_path)
    mask = octants(read_volume(store.image_path(uid)).geometry.shape)
    store.save_label(uid, raw(tmp_path / "l.bin", mask), "final", dict(NAMES))
    shutil.rmtree(tmp_path / "cache")
    again = store_of(pacs, tmp_path)
    assert again.get_labeled_images() == [uid]
    again.datalist()
    (case,) = find_cases(again.folder)
    assert case.values == {1: "liver", 2: "our own"}
    assert (read_volume(case.label).array[0] == np.select([mask == 2, mask == 5], [1, 2])).all()


def test_what_makes_no_volume_is_refused_with_its_reason_before_it_is_fetched(pacs, tmp_path):
    whole, holed, scout = generate_uid(), generate_uid(), generate_uid()
    write_phantom(tmp_path / "a", KINDS["axial"], SeriesInstanceUID=whole)
    write_phantom(tmp_path / "b", KINDS["axial"], SeriesInstanceUID=holed)
    (tmp_path / "b" / "slice_002.dcm").unlink()
    write_phantom(tmp_path / "c", KINDS["axial"], SeriesInstanceUID=scout, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    for name in "abc":
        pacs.upload(tmp_path / name)
    store = store_of(pacs, tmp_path)
    for uid, reason in ((holed, "slices are missing"), (scout, "scout")):
        with pytest.raises(InputError, match=reason):
            store.make_ready(uid)
        with pytest.raises(InputError, match=reason):
            store.image_path(uid)
        assert store.progress(uid).state == "refused" and store.progress(uid).done == 0
    store.make_ready(whole)
    assert store.image_path(whole)
    with pytest.raises(NotFoundError):
        store.image_path("1.2.3")


def test_a_pacs_that_is_away_is_said_to_be_and_no_label_is_lost(pacs, tmp_path):
    uid = generate_uid()
    pacs.upload(write_phantom(tmp_path / "s", KINDS["axial"], SeriesInstanceUID=uid))
    store = store_of(pacs, tmp_path)
    mask = octants(read_volume(store.image_path(uid)).geometry.shape)
    pacs.stop()
    store.forget_lists()
    store.save_label(uid, raw(tmp_path / "l.bin", mask), "final", dict(NAMES))
    assert any("not in the PACS" in remark for remark in store.last_saved.remarks)
    assert (read_volume(store.local_label(uid)).array[0] == mask).all()
    assert store.list_images() == [uid] == store.get_labeled_images()
    with pytest.raises(UnavailableError):
        store.image_path("1.2.3")


@pytest.mark.parametrize("text", ["", "1", "../1.2", "1.2/3", "1..2", "1.2\n", "1.2.x", "1." + "2" * 70, "１.２"])
def test_what_is_no_uid_becomes_no_path(text):
    with pytest.raises(InputError):
        check_uid(text, "image")
