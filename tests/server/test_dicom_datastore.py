"""Labels over DICOMweb, with real PACSs: what is submitted is what training reads and what the PACS gets."""

import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pydicom
import pytest
from dicomweb_client.api import DICOMwebClient
from monailabel.datastore.local import LocalDatastore
from pydicom.encaps import encapsulate
from pydicom.uid import JPEG2000Lossless, generate_uid

from pacs import make, pacs
from phantoms import KINDS, Kind, octants, write_phantom
from samadapt.data.cases import find_cases
from samadapt.data.dicom import dicom_files, read_series, series_grid
from samadapt.data.dicom_seg import read_seg, write_seg
from samadapt.data.volume import Geometry, read_label, read_volume
from samadapt.errors import InputError, NotFoundError, UnavailableError
from samadapt.server import outbox
from samadapt.server.dicom_datastore import SafeDicomDatastore
from samadapt.server.pacs import check_uid
from waiting import wait_until

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
        seg.ContentDate, seg.Manufacturer = day, "another program"
        seg.save_as(tmp_path / "seg.dcm", write_like_original=False)
        pacs.upload([tmp_path / "seg.dcm"])

    put("middle", "20200101", mask)
    put("oldest", "20100101", mask[::-1])
    store = store_of(pacs, tmp_path)
    assert store.list_images() == [uid]
    assert store.get_labeled_images() == [uid]
    entry = store.json()["objects"][uid]["labels"]["final"]["info"]
    assert [one["name"] for one in entry["label_info"]] == ["middle", "x"]
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
    write_phantom(
        tmp_path / "c", KINDS["axial"], SeriesInstanceUID=scout, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]
    )
    for name in "abc":
        pacs.upload(tmp_path / name)
    store = store_of(pacs, tmp_path)
    for uid, reason in ((holed, "slices are missing"), (scout, "scout")):
        with pytest.raises(InputError, match=reason):
            store.make_ready(uid)
        with pytest.raises(InputError, match=reason):
            store.image_path(uid)
        assert store.progress(uid).state == "refused"
        assert store.progress(uid).done == 0
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
    assert any("not yet in the PACS" in remark for remark in store.last_saved.remarks)
    assert (read_volume(store.local_label(uid)).array[0] == mask).all()
    assert store.list_images() == [uid] == store.get_labeled_images()
    with pytest.raises(UnavailableError):
        store.image_path("1.2.3")


@pytest.mark.parametrize("text", ["", "1", "../1.2", "1.2/3", "1..2", "1.2\n", "1.2.x", "1." + "2" * 70, "１.２"])
def test_what_is_no_uid_becomes_no_path(text):
    with pytest.raises(InputError):
        check_uid(text, "image")


MORNING, LATER = "20200101", "20990101"


class Case:
    """One series in a PACS and a server's store over it; ``mask`` has the values 2 (liver) and 5 (our own)."""

    def __init__(self, pacs, tmp_path):
        self.pacs, self.folder, self.uid = pacs, tmp_path, generate_uid()
        pacs.upload(write_phantom(tmp_path / "s", KINDS["oblique"], SeriesInstanceUID=self.uid))
        self.images = [pydicom.dcmread(path, stop_before_pixels=True) for path in dicom_files(tmp_path / "s")]
        self.grid = series_grid(self.images, "here")
        self.mask = octants(self.grid.geometry.shape)
        self.store = store_of(pacs, tmp_path)

    def submit(self, mask=None, **info):
        file = raw(self.folder / "l.bin", self.mask if mask is None else mask)
        self.store.save_label(self.uid, file, "final", {**NAMES, **info})

    def another_program_stores(self, names, day):
        """A SEG with the structures of ``names`` (value -> name), mirrored so that it can be told apart."""
        mask = np.where(np.isin(self.mask, list(names)), self.mask, 0)[::-1]
        seg = write_seg(mask, names, self.grid, self.images)
        seg.ContentDate, seg.Manufacturer = day, "another program"
        seg.save_as(self.folder / "seg.dcm", write_like_original=False)
        self.pacs.upload([self.folder / "seg.dcm"])
        self.store.forget_lists()

    def served(self, store=None):
        path = (store or self.store).get_label_uri(self.uid, "final")
        mask = read_volume(path).array[0]
        return "person" if (mask > 0).tolist() == (self.mask > 0).tolist() else "another program"


@pytest.fixture
def case(pacs, tmp_path):
    return Case(pacs, tmp_path)


@pytest.mark.parametrize(
    ("names", "day", "served", "reason"),
    [
        ({2: "liver", 5: "our own"}, MORNING, "person", "not newer"),
        ({2: "LIVER"}, LATER, "person", "our own"),
        ({2: "LIVER", 5: "our own"}, LATER, "another program", None),
    ],
)
def test_another_program_s_seg_replaces_a_person_s_label_only_if_newer_and_complete(case, names, day, served, reason):
    case.submit(client_id="ann")
    case.another_program_stores(names, day)
    assert case.served() == served
    versions = case.store.label_versions(case.uid)
    assert len(versions) == 2, "nothing is lost, whichever counts"
    if reason:
        (theirs,) = [version for version in versions if not version.served]
        assert any(reason in remark for remark in theirs.info["remarks"])
    else:
        assert versions[0].info["object"] != versions[1].info["object"]
    # What the PACS holds says the same to a server that has lost everything.
    shutil.rmtree(case.folder / "cache")
    again = store_of(case.pacs, case.folder)
    assert case.served(again) == served
    assert len(again.label_versions(case.uid)) == 2


def test_a_person_s_label_counts_over_another_program_s_that_was_there_before(case):
    case.another_program_stores({2: "liver", 5: "our own"}, LATER)
    assert case.served() == "another program"
    case.submit(client_id="ann")
    assert case.served() == "person"


def test_a_seg_says_who_drew_it_and_when_and_which_is_the_latest(case):
    case.submit(client_id="ann")
    case.submit(author="Bo Berg", client_id="ohif-1-2")
    case.submit()
    first, second, third = sorted(segs_of(case.pacs), key=lambda seg: seg.SeriesNumber)
    now = time.strftime("%Y%m%d")
    for seg, who in ((first, "ann"), (second, "Bo Berg"), (third, None)):
        assert seg.SeriesDate == seg.ContentDate
        assert abs(int(seg.ContentDate) - int(now)) <= 1
        assert seg.SeriesTime == seg.ContentTime
        day = f"{seg.ContentDate[:4]}-{seg.ContentDate[4:6]}-{seg.ContentDate[6:]}"
        assert f"{day} {seg.ContentTime[:2]}:{seg.ContentTime[2:4]}" in seg.SeriesDescription
        assert str(seg.get("ContentCreatorName") or "").strip("^") == (who or "")
        assert (who or "abel,") in seg.SeriesDescription
        assert "P7" not in seg.SeriesDescription
    assert len({seg.SeriesNumber for seg in (first, second, third)}) == 3


@pytest.mark.parametrize("name", ["x" * 200, "A=B^C\\D", "田中 太郎", "ann\n"])
def test_whoever_has_drawn_it_their_name_makes_a_readable_seg(case, name):
    case.submit(client_id=name)
    (seg,) = segs_of(case.pacs)
    assert len(seg.SeriesDescription) <= 64
    assert str(seg.ContentCreatorName).strip("^")


def test_a_label_that_the_pacs_did_not_get_is_sent_by_itself_when_the_pacs_is_back(case, monkeypatch):
    monkeypatch.setattr(outbox, "FIRST_PAUSE_S", 0.2)
    case.store.image_path(case.uid)
    case.pacs.pause()
    case.store.forget_lists()
    case.submit(client_id="ann")
    case.submit(case.mask[::-1], client_id="bob")
    assert any("not yet in the PACS" in remark for remark in case.store.last_saved.remarks)
    waiting = case.store.not_in_pacs()
    assert [(one["image"], one["author"]) for one in waiting] == [(case.uid, "ann"), (case.uid, "bob")]
    assert all("does not answer" in one["reason"] for one in waiting)
    case.pacs.start()
    wait_until(lambda: not case.store.not_in_pacs())
    assert {str(seg.ContentCreatorName).strip("^") for seg in segs_of(case.pacs)} == {"ann", "bob"}
    case.store.forget_lists()
    assert case.store.label_versions(case.uid)[0].info["client_id"] == "bob"
    assert len(case.store.label_versions(case.uid)) == 2, "a SEG that came late is nobody else's label"


def test_a_label_that_the_pacs_did_not_get_is_sent_after_a_restart(case, monkeypatch):
    monkeypatch.setattr(case.store._outbox, "begin", lambda: None)  # this server ends before it tries again
    case.store.image_path(case.uid)
    case.pacs.pause()
    case.store.forget_lists()
    case.submit(client_id="ann")
    case.pacs.start()
    again = store_of(case.pacs, case.folder)
    assert [one["image"] for one in again.not_in_pacs()] == [case.uid]
    again.begin()
    wait_until(lambda: not again.not_in_pacs())
    assert len(segs_of(case.pacs)) == 1
    assert again.get_labeled_images() == [case.uid]


def test_a_seg_whose_label_was_never_saved_is_not_sent(case, monkeypatch):
    def crash(*args, **kwargs):
        raise KeyboardInterrupt

    case.store.image_path(case.uid)
    monkeypatch.setattr(LocalDatastore, "_init_from_datastore_file", crash)
    with pytest.raises(KeyboardInterrupt):
        case.submit(client_id="ann")
    monkeypatch.undo()
    again = store_of(case.pacs, case.folder)
    again.begin()
    assert again.not_in_pacs() == []
    assert segs_of(case.pacs) == []


def test_what_the_pacs_refuses_is_told_and_tried_again(tmp_path, monkeypatch):
    """Our own server can be made to refuse: the folder of what it receives is taken away."""
    monkeypatch.setattr(outbox, "FIRST_PAUSE_S", 0.2)
    running = make("embedded").start()
    try:
        case = Case(running, tmp_path)
        case.store.image_path(case.uid)
        received = running.folder / ".samadapt" / "dicomweb" / "received"
        (kept,) = received.iterdir()
        kept.rename(tmp_path / "kept")
        kept.write_text("in the way")
        case.submit(client_id="ann")
        (waiting,) = case.store.not_in_pacs()
        assert "refused" in waiting["reason"]
        kept.unlink()
        (tmp_path / "kept").rename(kept)
        wait_until(lambda: not case.store.not_in_pacs())
        assert len(segs_of(running)) == 1
    finally:
        running.stop()


def test_a_save_that_waits_for_the_pacs_holds_up_no_other_image(tmp_path):
    """A PACS that takes two seconds for each SEG: a real one behind a proxy that waits."""
    running = make("embedded").start()
    try:
        uids = [generate_uid() for _ in range(3)]
        for n, uid in enumerate(uids):
            running.upload(write_phantom(tmp_path / str(n), KINDS["axial"], SeriesInstanceUID=uid))
        store = store_of(running, tmp_path)
        mask = octants(read_volume(store.image_path(uids[0])).geometry.shape)
        for uid in uids:
            store.image_path(uid)
        quick = store._pacs.store

        def slow(dataset):
            time.sleep(2)
            quick(dataset)

        store._outbox._send = slow
        started = time.monotonic()
        with ThreadPoolExecutor(3) as people:
            files = [raw(tmp_path / f"{n}.bin", mask) for n in range(3)]
            list(people.map(lambda n: store.save_label(uids[n], files[n], "final", dict(NAMES)), range(3)))
        assert time.monotonic() - started < 5.0
        assert len(segs_of(running)) == 3
    finally:
        running.stop()


@pytest.mark.parametrize("tags", [{"StudyInstanceUID": generate_uid(), "PatientID": "P8"}, {"PatientID": "P8"}])
def test_one_series_uid_for_two_patients_is_refused(case, tags):
    study = case.images[0].StudyInstanceUID
    case.pacs.upload(
        write_phantom(
            case.folder / "t", KINDS["oblique"], **{"SeriesInstanceUID": case.uid, "StudyInstanceUID": study, **tags}
        )
    )
    case.store.forget_lists()
    for refused in (case.store.make_ready, case.store.image_path):
        with pytest.raises(InputError, match=r"several|patients|same position"):
            refused(case.uid)
    with pytest.raises(InputError):
        case.submit()
    assert segs_of(case.pacs) == []


def test_a_series_that_comes_to_be_ambiguous_later_takes_no_label_any_more(case):
    case.submit(client_id="ann")
    case.pacs.upload(write_phantom(case.folder / "t", KINDS["oblique"], SeriesInstanceUID=case.uid, PatientID="P8"))
    case.store.forget_lists()
    case.store.list_images()
    with pytest.raises(InputError, match="several studies"):
        case.submit(client_id="bob")
    assert case.store.label_versions(case.uid)[0].info["client_id"] == "ann"


def test_a_series_that_could_not_be_read_is_not_offered_again_after_a_restart(tmp_path):
    running = make("embedded").start()
    try:
        uid = generate_uid()
        folder = write_phantom(tmp_path / "s", KINDS["axial"], SeriesInstanceUID=uid)
        for path in dicom_files(folder):
            image = pydicom.dcmread(path)
            image.file_meta.TransferSyntaxUID = JPEG2000Lossless
            image.PixelData = encapsulate([b"this is no picture "])
            image["PixelData"].is_undefined_length = True
            image.save_as(path)
        running.upload(folder)
        store = store_of(running, tmp_path)
        store.make_ready(uid)
        with pytest.raises(InputError, match="pixels cannot be read"):
            store.image_path(uid)
        with pytest.raises(InputError, match="pixels cannot be read"):
            store_of(running, tmp_path).make_ready(uid)
        write_phantom(tmp_path / "more", Kind(slices=7), SeriesInstanceUID=uid)
        late = pydicom.dcmread(tmp_path / "more" / "slice_006.dcm")
        late.StudyInstanceUID = image.StudyInstanceUID
        late.save_as(tmp_path / "late.dcm")
        running.upload([tmp_path / "late.dcm"])
        again = store_of(running, tmp_path)
        again.make_ready(uid)  # it has changed: it gets another chance
        assert again.progress(uid).state in ("fetching", "refused")
    finally:
        running.stop()
