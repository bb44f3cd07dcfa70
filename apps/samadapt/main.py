"""The MONAI Label app: ``monailabel start_server --app apps/samadapt --studies DIR [--conf key value]``.

The work is done in the library beside this file (``lib/samadapt``). This file is executed by the host, not imported:
no dataclasses, nothing to pickle and no postponed annotations here.
"""

import os
import sys
import threading
from pathlib import Path
from typing import Any, Dict, Optional  # noqa: UP035

if not (3, 10) <= sys.version_info[:2] <= (3, 11):
    raise RuntimeError(f"samadapt runs on Python 3.10 and 3.11, not on {sys.version.split()[0]}: {sys.executable}")

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT / "lib") not in sys.path:
    sys.path.insert(0, str(ROOT / "lib"))

try:
    import monailabel.interfaces.app as host
    from monailabel.interfaces.app import MONAILabelApp

    from samadapt.config import AppConfig
    from samadapt.errors import InputError
    from samadapt.memory import keep_freed_memory
    from samadapt.project import Project
    from samadapt.server.ahead import AheadOfNeed
    from samadapt.server.auto_train import AutoTrain
    from samadapt.server.dicom_datastore import SafeDicomDatastore
    from samadapt.server.in_advance import SeriesInAdvance
    from samadapt.server.infer import AS_SERIES, Clicks, OneDeviceBatchInfer, Segmentation
    from samadapt.server.labels import LabelSource, label_warnings, newcomers
    from samadapt.server.launch import needs_dicomweb
    from samadapt.server.models import Models
    from samadapt.server.offered import OfferedDatastore
    from samadapt.server.options import flag, is_upload
    from samadapt.server.outlook import Outlook
    from samadapt.server.strategies import all_strategies
    from samadapt.server.train import TrainSamAdapt, is_under_way
except ImportError as error:
    hint = f"{sys.executable} -m pip install -r {ROOT / 'requirements.txt'}"
    raise ImportError(f"samadapt: {error}. Install what it needs: {hint}") from error


class SamAdaptApp(MONAILabelApp):
    """Infer tasks ``samadapt``, ``samadapt_click`` and ``samadapt_click_3d``, one train task ``samadapt``.

    Nothing is downloaded and no model is loaded here; both happen when a request first needs them.
    """

    def __init__(self, app_dir: str, studies: str, conf: Dict[str, str]):  # noqa: UP006
        keep_freed_memory()
        self.inferring = threading.Lock()  # requests come in threads; one inference at a time has the processor
        self.settings = AppConfig.from_strings(conf or {})
        # dcmqi's programs lie beside Python; without them the base class would try to download them
        os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        super().__init__(
            app_dir,
            studies,
            conf or {},
            name="samadapt",
            description="SAM models that learn from the labels you submit",
        )

    def init_datastore(self):
        host.DICOMWebDatastore = SafeDicomDatastore  # the base class makes its store by this name
        remote = self.studies.startswith(("http://", "https://"))
        if not remote and Path(self.studies).is_dir() and needs_dicomweb(Path(self.studies)):
            raise InputError(
                "only DICOM files here, which viewers load over DICOMweb",
                where=self.studies,
                remedy=f"Use `samadapt serve --studies {self.studies}`, which offers them so, or a PACS's address.",
            )
        datastore = super().init_datastore() if remote else OfferedDatastore(self.studies)
        folder = Path(datastore.folder)
        self.project = Project(folder)
        self.models = Models(self.settings, self.project)
        self.label_source = LabelSource(self.settings.labels, folder, self.project)
        self.label_source.learn_from(datastore)
        datastore.geometry_of = self.models.geometry
        datastore.assumed = self.settings.coverage
        datastore.known_labels = self.label_source.current
        self.outlook = Outlook(self.settings, self.project, self.models, self.datastore)
        images, path_of = self.outlook.upcoming, datastore.image_path
        if remote:
            in_advance = SeriesInAdvance(datastore, self.outlook.upcoming, self.outlook.refused)
            images, path_of = in_advance.images, in_advance.image_path
        self.ahead = AheadOfNeed(
            self.models,
            images,
            path_of,
            lambda: is_under_way(self.project),
            self.outlook.wanted,
            self.outlook.look,
            self.outlook.unreadable,
        )
        self.auto_train = AutoTrain(
            self.settings.auto_train,
            self.project,
            datastore.final_labels,
            lambda: is_under_way(self.project),
            self.train_now,
        )
        return datastore

    def train_now(self):
        trainer = self._trainers["samadapt"]
        trainer.check({}, self.datastore())
        self.async_training(trainer.name)

    def init_infers(self):
        return {
            "samadapt": Segmentation(self.models, self.label_source),
            "samadapt_click": Clicks(self.models, self.label_source, dimension=2),
            "samadapt_click_3d": Clicks(self.models, self.label_source, dimension=3),
        }

    def init_trainers(self):
        return {"samadapt": TrainSamAdapt("samadapt", self.settings, self.project, self.label_source)}

    def init_strategies(self):
        return all_strategies(self.settings.strategy, self.outlook)

    def init_batch_infer(self):
        return OneDeviceBatchInfer()

    def server_mode(self, mode: bool):
        """The server calls this once it is up and before the first request: the place to guard its endpoints."""
        super().server_mode(mode)
        if mode and "monailabel.app" in sys.modules:
            from samadapt.server import guards

            guards.install(sys.modules["monailabel.app"].app, self)
            self.datastore().begin()
            if self.settings.embed_ahead:
                self.ahead.start()
            self.auto_train.watch()

    def info(self):
        own = {"embedded_ahead": self.ahead.progress(), "auto_train": self.auto_train.state()}
        return {**super().info(), **own, "not_in_pacs": self.datastore().not_in_pacs()}

    def next_sample(self, request):
        """As the base class's; the image that it names is encoded while the viewer loads it."""
        sample = super().next_sample(request)
        if not sample:
            return sample
        self.ahead.first(sample["id"])
        return {**sample, **self.datastore().in_viewer(sample["id"], sample["slices"])}

    def infer(self, request: Dict[str, Any], datastore: Optional[Any] = None):  # noqa: UP006, UP045
        """As the base class's, except that no path from outside is opened: an image is an id or an upload."""
        task = self._infers.get(request.get("model"))
        if task is None:
            known = ", ".join(self._infers)
            raise InputError(f"there is no model {request.get('model')!r}", where="model", remedy=f"Valid: {known}.")
        store = datastore or self.datastore()
        image = str(request["image"])
        uploaded = is_upload(image, self._sessions.store_path if self._sessions else None)
        path = image if uploaded else store.image_path(image)
        known = image if uploaded else store.known_id(image)
        with self.inferring, self.ahead.giving_way():
            file, params = task({**request, "image": path, AS_SERIES: known != image})
        image = known
        if not uploaded:
            self.ahead.first(image)
            self.outlook.leases.renew(image, request.get("client_id"))
        label = file
        if flag(request, "save_label", default=False) and not uploaded:
            named = [{"name": name, "idx": index} for name, index in params["label_names"].items()]
            information = {"model": request["model"], "params": params, "label_info": named}
            label = store.save_label(image, file, request.get("label_tag", "original"), information)
        return {"label": label, "tag": "original", "file": file, "params": params}

    def infer_wsi(self, request: Dict[str, Any], datastore: Optional[Any] = None):  # noqa: UP006, UP045
        raise InputError("there is no whole-slide model", where="/infer/wsi", remedy="Use POST /infer/samadapt.")

    def forget_lists(self):
        """Something was stored: what the PACS holds is asked for anew."""
        if isinstance(self.datastore(), SafeDicomDatastore):
            self.datastore().forget_lists()

    def on_save_label(self, image_id: str, label_id: str):
        """Take up new label names; tell the annotator what looks odd about the label."""
        image_id = self.datastore().known_id(image_id)
        super().on_save_label(image_id, label_id)
        self.forget_lists()
        saved = self.datastore().last_saved
        if saved.version is not None:  # under another tag the case stays unlabelled, and with whoever has it
            self.outlook.leases.end(image_id)
        self.ahead.again(image_id)
        before = self.label_source.current()
        self.label_source.learn_from(self.datastore())
        labels = self.label_source.current()
        new = [] if labels == before else newcomers(saved.info, before)
        warnings = new + label_warnings(saved.info, saved.present, labels, saved.coverage, saved.slices)
        warnings += saved.remarks
        return {"warnings": warnings, "labels": self.label_source.indices(), "version": saved.version}
