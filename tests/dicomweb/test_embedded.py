"""What only the server that comes with us does: whole folders, with all that goes wrong in them."""

from __future__ import annotations

import os
import shutil
import sqlite3

import numpy as np
import pytest
import requests
from dicomweb_client.api import DICOMwebClient
from pydicom import dcmread
from pydicom.encaps import encapsulate
from pydicom.uid import ExplicitVRBigEndian, ImplicitVRLittleEndian, JPEG2000Lossless, RLELossless, generate_uid

from make_dicom import write_image, write_rtstruct, write_stack
from pacs import Embedded
from samadapt.dicomweb import multipart
from samadapt.dicomweb.app import Archive
from samadapt.dicomweb.frames import read_frames
from samadapt.dicomweb.index import Index
from samadapt.dicomweb.query import Query
from samadapt.errors import InputError

VOLUME = np.arange(4 * 6 * 5, dtype=np.int16).reshape(4, 6, 5)
PLACES = [(0, 0, z) for z in range(4)]
OTHER_SERIES = {"StudyInstanceUID": "1.2.3", "SeriesInstanceUID": "1.2.3.9"}
OTHER_STUDY = {"StudyInstanceUID": "1.2.9", "SeriesInstanceUID": "1.2.9.1"}
DICOM = 'multipart/related; type="application/dicom"; boundary=b'


@pytest.fixture
def folder(tmp_path):
    tags = {"StudyInstanceUID": "1.2.3", "SeriesInstanceUID": "1.2.3.4", "PatientName": "Berg^Bo", "PatientID": "Be"}
    write_stack(tmp_path / "studies" / "series", VOLUME, PLACES, **tags)
    return tmp_path / "studies"


@pytest.fixture
def embedded(folder):
    running = Embedded(folder).start()
    yield running
    running.stop()


def indexed(folder):
    archive = Archive(folder)
    archive.look()
    return archive


def files(folder):
    return sorted((folder / "series").glob("*.dcm"))


def body(*contents):
    parts = [b"--b\r\nContent-Type: application/dicom\r\n\r\n" + content + b"\r\n" for content in contents]
    return b"".join([*parts, b"--b--\r\n"])


def stow(embedded, *contents, study=""):
    url = f"{embedded.url}/studies/{study}".rstrip("/")
    return requests.post(url, data=body(*contents), headers={"Content-Type": DICOM}, timeout=30)


def test_what_cannot_be_used_is_left_out_and_named(folder):
    whole = files(folder)[0].read_bytes()
    wrong = folder / "wrong"
    wrong.mkdir()
    for name, content in {
        "no pixels.dcm": whole[: whole.index(b"\xe0\x7f\x10\x00")],
        "half the pixels.dcm": whole[:-30],
        "half a header.dcm": whole[:400],
        "mark alone.dcm": b"\0" * 128 + b"DICM",
        "noise.dcm": b"\0" * 128 + b"DICM" + os.urandom(3000),
        "text.txt": b"hello",
        "empty.dcm": b"",
    }.items():
        (wrong / name).write_bytes(content)
    shutil.copy(files(folder)[0], wrong / "z copy.dcm")
    write_rtstruct(wrong / "structures.dcm")
    os.mkfifo(wrong / "pipe")
    status = indexed(folder).status()
    assert (status["instances"], status["series"]) == (5, 2)
    named = {path.rsplit("/")[-1]: reason for path, reason in status["left_out"].items()}
    assert set(named) == {
        "no pixels.dcm",
        "half the pixels.dcm",
        "half a header.dcm",
        "mark alone.dcm",
        "noise.dcm",
        "z copy.dcm",
    }
    assert "30 bytes of its pixels are missing" in named["half the pixels.dcm"]
    assert str(files(folder)[0]) in named["z copy.dcm"]


def test_files_that_are_no_dicom_are_counted_and_the_first_named(folder):
    for n in range(7):
        (folder / f"note {n}.txt").write_text("hello")
    (folder / ".hidden").write_text("hello")
    archive = indexed(folder)
    told = archive.status()["not_dicom"]
    assert told == {"files": 7, "first": [str(folder / f"note {n}.txt") for n in range(5)]}
    (folder / "note 0.txt").unlink()
    archive.look()
    assert archive.status()["not_dicom"]["files"] == 6


def edited(source, target, **tags):
    data = dcmread(source)
    for name, value in tags.items():
        setattr(data, name, value)
    target.parent.mkdir(exist_ok=True)
    data.save_as(target, write_like_original=False)
    return str(target)


def test_one_instance_uid_with_other_contents_is_a_conflict_and_not_a_copy(folder):
    one, two, three = files(folder)[:3]
    other_pixels = dcmread(one).PixelData[::-1]
    copy = edited(one, folder / "z" / "copy.dcm", PatientComments="copied")
    pixels = edited(two, folder / "z" / "pixels.dcm", PixelData=other_pixels)
    series = edited(three, folder / "z" / "series.dcm", **OTHER_SERIES)
    for _ in range(2):  # what was compared is known after a restart
        status = indexed(folder).status()
        assert status["instances"] == 4
        assert set(status["conflicts"]) == {pixels, series}
        assert "the same instance" in status["left_out"][copy]
        assert "other pixels" in status["left_out"][pixels]
        assert str(two) in status["left_out"][pixels]
        assert "another series" in status["left_out"][series]
    edited(two, folder / "z" / "pixels.dcm")
    assert pixels not in indexed(folder).status()["conflicts"]


@pytest.mark.parametrize("tags", [{"StudyInstanceUID": "1.2.9"}, {"PatientID": "another"}])
def test_one_series_uid_for_several_studies_or_patients_is_named(folder, tags):
    assert indexed(folder).status()["conflicts"] == {}
    edited(files(folder)[0], folder / "z" / "other.dcm", SOPInstanceUID=generate_uid(), **tags)
    status = indexed(folder).status()
    assert list(status["conflicts"]) == ["1.2.3.4"]
    assert status["instances"] == 5


def test_only_what_has_changed_is_read_again(folder):
    indexed(folder)
    seen = []
    again = Archive(folder, lambda done, total: seen.append((done, total)))
    again.look()
    assert seen == [(4, 4)]
    files(folder)[0].unlink()
    write_image(
        folder / "series" / "later.dcm", VOLUME[0], (0, 0, 9), StudyInstanceUID="1.2.3", SeriesInstanceUID="1.2.3.9"
    )
    again.look()
    assert {tuple(found.header["0020000E"]["Value"]) for found in again.index.series("1.2.3")} == {
        ("1.2.3.4",),
        ("1.2.3.9",),
    }
    assert again.index.counts()["instances"] == 4


def test_a_file_that_is_mended_counts_and_one_that_is_damaged_does_not_any_more(folder):
    path = files(folder)[0]
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    archive = indexed(folder)
    assert archive.index.counts()["instances"] == 3
    path.write_bytes(whole)
    archive.look()
    assert archive.index.counts()["instances"] == 4
    assert archive.index.problems() == {}
    path.write_text("no DICOM any more")
    archive.look()
    assert archive.index.counts()["instances"] == 3


def test_a_copy_takes_the_place_of_a_file_that_is_removed(folder):
    shutil.copytree(folder / "series", folder / "twice")
    archive = indexed(folder)
    assert archive.index.counts() == {"studies": 1, "series": 1, "instances": 4}
    assert len(archive.index.problems()) == 4
    shutil.rmtree(folder / "series")
    archive.look()
    assert {path.parent.name for path in archive.index.paths("1.2.3")} == {"twice"}


def test_a_damaged_index_is_made_anew(folder):
    indexed(folder)
    database = folder / ".samadapt" / "dicomweb" / "index.sqlite"
    for leftover in database.parent.glob("index.sqlite-*"):
        leftover.unlink()
    database.write_bytes(b"no database" * 1000)
    assert indexed(folder).index.counts()["instances"] == 4
    sqlite3.connect(database).execute("SELECT COUNT(*) FROM files")


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRBigEndian, RLELossless, JPEG2000Lossless])
def test_frames_of_every_transfer_syntax(tmp_path, syntax):
    path = write_image(tmp_path / "one.dcm", VOLUME[1] + 256, (0, 0, 0))
    data = dcmread(path)
    pixels = data.pixel_array
    if syntax == RLELossless:
        data.compress(RLELossless)
    elif syntax == JPEG2000Lossless:
        data.PixelData = encapsulate([_jpeg2000(pixels)])
        data["PixelData"].is_undefined_length = True
    elif syntax == ExplicitVRBigEndian:
        data.PixelData = pixels.astype(">i2").tobytes()
    data.file_meta.TransferSyntaxUID = syntax
    data.is_little_endian, data.is_implicit_VR = syntax.is_little_endian, syntax.is_implicit_VR
    data.save_as(path, write_like_original=False)
    (frame,) = read_frames(path, [1], decode=True)
    assert (np.frombuffer(frame.data, "<i2").reshape(pixels.shape) == pixels).all()
    assert frame.transfer_syntax == "1.2.840.10008.1.2.1"
    (stored,) = read_frames(path, [1], decode=False)
    assert stored.transfer_syntax == (str(syntax) if syntax.is_compressed else "1.2.840.10008.1.2.1")
    path.write_bytes(path.read_bytes()[:-9])
    assert Index([tmp_path], tmp_path / ".index").problems() == {}
    index = Index([tmp_path], tmp_path / ".index")
    index.update()
    assert "cut off" in index.problems()[str(path)]


def _jpeg2000(pixels):
    """The signed pixels through GDCM, which pydicom 2 cannot write."""
    import io

    from PIL import Image

    with io.BytesIO() as written:
        Image.fromarray(pixels.astype(np.uint16)).save(written, "JPEG2000", irreversible=False)
        return written.getvalue() + b"\0" * (written.tell() % 2)


def test_frames_of_a_binary_segmentation_begin_with_a_byte_each(tmp_path):
    frames = np.random.default_rng(0).integers(0, 2, (3, 5, 5), dtype=np.uint8)
    path = write_image(tmp_path / "seg.dcm", VOLUME[0], (0, 0, 0))
    data = dcmread(path)
    data.Rows = data.Columns = 5
    data.BitsAllocated = data.BitsStored = 1
    data.HighBit, data.PixelRepresentation, data.NumberOfFrames = 0, 0, 3
    data.PixelData = np.packbits(frames.ravel(), bitorder="little").tobytes()
    data.save_as(path)
    for number, frame in zip((3, 1, 2), read_frames(path, [3, 1, 2], decode=False), strict=True):
        bits = np.unpackbits(np.frombuffer(frame.data, np.uint8), bitorder="little")[:25]
        assert (bits.reshape(5, 5) == frames[number - 1]).all()


@pytest.mark.parametrize(
    ("wanted", "found"),
    [("Berg^Bo", 1), ("berg^b?", 1), ("Bo", 0), ("[Bb]erg*", 0), ("Müller*", 0), ("*^B*", 1), ("Berg*^*x", 0)],
)
def test_names_are_compared_as_dicom_has_it(embedded, wanted, found):
    """Encoded in the query, which Orthanc 1.10 does not take."""
    assert len(DICOMwebClient(embedded.url).search_for_studies(search_filters={"PatientName": wanted})) == found


@pytest.mark.parametrize("query", ["limit=-1", "offset=x", "FrobnicationTime=3", "PixelData=1", "0018FFFF=1"])
def test_a_query_that_cannot_be_answered_is_refused_with_a_remedy(query):
    with pytest.raises(InputError) as refused:
        Query.from_parameters([tuple(query.split("="))])
    assert refused.value.remedy


def test_no_answer_for_a_name_that_points_here(embedded):
    answer = requests.get(f"{embedded.url}/studies", headers={"Host": "evil.example"}, timeout=10)
    assert answer.status_code == 400


def test_what_is_stored_lies_below_the_folder_and_is_there_after_a_restart(embedded, folder, tmp_path):
    new = write_image(tmp_path / "new.dcm", VOLUME[0], (0, 0, 0), **OTHER_STUDY)
    answer = stow(embedded, new.read_bytes())
    assert answer.status_code == 200
    read = dcmread(new)
    kept = folder / ".samadapt" / "dicomweb" / "received" / "1.2.9" / "1.2.9.1" / f"{read.SOPInstanceUID}.dcm"
    assert kept.read_bytes() == new.read_bytes()
    embedded.stop()
    embedded.start()
    assert len(DICOMwebClient(embedded.url).search_for_instances("1.2.9")) == 1


def test_the_same_instance_again_is_fine_and_another_under_its_name_is_not(embedded, folder):
    path = files(folder)[0]
    assert stow(embedded, path.read_bytes()).status_code == 200
    changed = dcmread(path)
    changed.PatientID = "another"
    changed.save_as(path.with_suffix(".changed"))
    answer = stow(embedded, path.with_suffix(".changed").read_bytes())
    path.with_suffix(".changed").unlink()
    assert answer.status_code == 409
    (failed,) = answer.json()["00081198"]["Value"]
    assert failed["00081197"]["Value"] == [0x0111]
    assert dcmread(path).PatientID == "Be"
    assert not list((folder / ".samadapt" / "dicomweb" / "received").rglob("*.dcm"))


def test_refused_instances_are_told_from_stored_ones(embedded, folder, tmp_path):
    good = write_image(
        tmp_path / "new.dcm", VOLUME[0], (0, 0, 0), StudyInstanceUID="1.2.9", SeriesInstanceUID="1.2.9.1"
    )
    outside = dcmread(good)
    outside.SOPInstanceUID = outside.file_meta.MediaStorageSOPInstanceUID = "../../outside"
    outside.save_as(tmp_path / "outside.dcm")
    contents = [good.read_bytes(), b"no DICOM", good.read_bytes()[:-20], (tmp_path / "outside.dcm").read_bytes()]
    answer = stow(embedded, *contents)
    assert answer.status_code == 202
    assert len(answer.json()["00081199"]["Value"]) == 1
    assert len(answer.json()["0008119A"]["Value"]) == 3
    assert "20 bytes" in answer.headers["Warning"]
    assert len(list(folder.parent.rglob(f"{dcmread(good).SOPInstanceUID}.dcm"))) == 1
    assert not list(folder.parent.rglob("outside.dcm.dcm"))


def test_instances_of_another_study_than_the_address_are_refused(embedded, folder):
    answer = stow(embedded, files(folder)[0].read_bytes(), study="1.2.77")
    assert answer.status_code == 409
    assert answer.json()["00081198"]["Value"][0]["00081197"]["Value"] == [0xA900]


@pytest.mark.parametrize("content_type", ["application/dicom", "multipart/related", "text/plain", ""])
def test_a_message_that_is_none_is_refused(embedded, content_type):
    answer = requests.post(f"{embedded.url}/studies", data=b"x", headers={"Content-Type": content_type}, timeout=10)
    assert answer.status_code == 400
    assert answer.json()["remedy"]


def test_long_vendor_attributes_are_named_by_an_address_that_has_them(embedded, folder, tmp_path):
    data = dcmread(files(folder)[0])
    data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    block = data.private_block(0x0029, "SOME VENDOR", create=True)
    block.add_new(0x10, "OB", bytes(range(256)) * 20)
    data.save_as(tmp_path / "vendor.dcm")
    embedded.upload([tmp_path / "vendor.dcm"])
    client = DICOMwebClient(embedded.url)
    described = client.retrieve_instance_metadata("1.2.3", "1.2.3.4", data.SOPInstanceUID)
    assert "InlineBinary" not in described["00291010"]
    (content,) = client.retrieve_bulkdata(described["00291010"]["BulkDataURI"])
    assert content == bytes(range(256)) * 20


def test_values_longer_than_the_standard_allows_are_shown(folder):
    for path in files(folder):
        data = dcmread(path)
        data.StudyID = "a study id of 25 letters."
        data.save_as(path)
    running = Embedded(folder).start()
    try:
        client = DICOMwebClient(running.url)
        assert client.retrieve_study_metadata("1.2.3")[0]["00200010"]["Value"] == ["a study id of 25 letters."]
        assert client.search_for_studies()[0]["00200010"]["Value"] == ["a study id of 25 letters."]
    finally:
        running.stop()


def test_new_files_are_found_when_the_study_list_is_asked_for_again(folder, monkeypatch):
    monkeypatch.setattr("samadapt.dicomweb.app.LOOK_AGAIN_S", 0.0)
    archive = indexed(folder)
    write_image(folder / "later.dcm", VOLUME[0], (0, 0, 9), StudyInstanceUID="1.2.8", SeriesInstanceUID="1.2.8.1")
    archive.look_again()
    while archive.status()["indexing"]:
        pass
    assert archive.index.counts()["studies"] == 2


def test_parts_are_read_as_they_were_written():
    contents = [b"\r\n", b"a\r\n\r\n--", bytes(range(256)), b"DICM\r\n"]
    assert [part for _, part in multipart.parts(body(*contents), DICOM)] == contents
