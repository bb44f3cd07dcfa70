"""What is known of every case, gathered while nobody waits, and what to label next by it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Hashable
from dataclasses import replace
from pathlib import Path
from typing import Any

from samadapt.activelearning import registry
from samadapt.activelearning.leases import Leases
from samadapt.activelearning.observe import EARLIER
from samadapt.activelearning.strategy import Candidate, Pool, Proposal, Strategy
from samadapt.activelearning.survey import Survey
from samadapt.config import AppConfig
from samadapt.data.cases import FINAL, Case, assume, find_cases
from samadapt.errors import SamAdaptError, UnavailableError
from samadapt.files import sha256_of
from samadapt.inference.quality import Quality, quality
from samadapt.project import Project
from samadapt.server.models import PLAIN, Models
from samadapt.training.slices import read_case

logger = logging.getLogger(__name__)

ALWAYS = frozenset({"descriptor", "slice_descriptors", "examination", "label_dice"})
"""What is gathered of every case whatever the strategy; the rest only for the configured one, and for those that
somebody has chosen."""

AHEAD = 4
"""So many cases are ranked that nobody has. To rank all would take seconds among thousands, and
strategies that look for variety would have to tell all apart instead of finding the typical ones."""

ALL_LABELLED = "every image has a final label; add images to the studies folder to go on"


class Outlook:
    """Ranks unlabelled cases for the server's strategies and foretells what the model makes of them.

    Args:
        config: seed and length of leases.
        project: where surveys and leases are kept.
        models: who answers.
        datastore: called when it is needed.
    """

    def __init__(self, config: AppConfig, project: Project, models: Models, datastore: Callable[[], Any]) -> None:
        self._seed = config.seed or 0
        self._coverage = config.coverage
        self._models = models
        self._datastore = datastore
        self._studies = project.root.parent
        self.leases = Leases(project.root / "leases.json", 60.0 * config.lease_minutes)
        self._survey = Survey(project.root / "survey" / _encoder(config))
        self._lock = threading.Lock()
        self._needs = ALWAYS | registry.strategy(config.strategy).needs
        self._unreadable: dict[str, str] = {}
        self._order: list[str] = []
        self._cases: dict[str, Case] = {}
        self._cases_of: tuple[int, ...] = ()

    # ---- while nobody waits

    def upcoming(self) -> list[str]:
        """Ids of all images, those first that will probably be asked for next."""
        unlabelled = self._datastore().get_unlabeled_images()
        place = {case: n for n, case in enumerate(self._order)}
        ahead = sorted(unlabelled, key=lambda case: (place.get(case, len(place)), case))
        return ahead + sorted(set(self._datastore().list_images()) - set(unlabelled))

    def wanted(self) -> Hashable:
        """For what ``look`` gathers: the version in service, and what strategies need. Cheap."""
        return self._models.version(), self._needs

    def look(self, image: str, wait: Callable[[], None]) -> None:
        """Gather what strategies need of one image. ``wait`` returns when the machine is free for it."""
        served = self._models.current()
        trained = served.version != PLAIN
        version = served.version if trained else None
        case = self._labelled_case(image) if trained else None
        needs = self._needs if case else self._needs - {"label_dice"}
        path, label_file = Path(self._datastore().image_path(image)), case.label if case else None
        missing = self._survey.missing(image, path, version, needs, label_file)
        if not missing:
            return
        cache = self._models.cache
        volume, label, report = read_case(case, served.model.info.labels) if case else (None, None, None)
        self._survey.look(
            image,
            path,
            needs,
            plain=self._models.plain().model,
            volume=volume,
            model=served.model if trained else None,
            version=version,
            earlier=self._models.earlier(EARLIER) if "spread" in missing else (),
            cache=cache.reader() if cache.full() else cache,
            label=label,
            label_file=label_file,
            unknown=report.unknown if report else (),
            progress=lambda done, total: wait(),
        )

    def unreadable(self, image: str, why: str) -> None:
        """Propose this image to nobody until the server starts anew."""
        self._unreadable[image] = why

    def refused(self) -> Collection[str]:
        """Ids of images that are proposed to nobody."""
        return self._unreadable.keys()

    # ---- for annotators

    def propose(self, strategy: Strategy, client: str | None) -> dict[str, Any] | None:
        """The next case for one annotator, and the lease of it; None if there is none for now.

        Returns:
            ``id``, ``slices`` and ``reason`` of the proposal, ``chosen_by``: the strategy, and where there are any,
            ``skipped``: unreadable images.
        """
        with self._lock:
            self._needs |= strategy.needs
            while proposals := self._rank(strategy, client):
                for proposal in proposals:
                    if self._readable(proposal.id):
                        self.leases.take(proposal.id, client)
                        return self._answer(strategy, proposal)
        return None

    def why_nothing(self, strategy: Strategy) -> str:
        """Why there is no next case by ``strategy``, for whoever asked for one."""
        store = self._datastore()
        choice = store.get_labeled_images() if strategy.of_labelled else store.get_unlabeled_images()
        waiting = [case for case in choice if case not in self._unreadable]
        ends = self.leases.first_end()
        if waiting and ends is not None:
            return (
                f"the {len(waiting)} images with{'' if strategy.of_labelled else 'out'} a label are all with "
                f"annotators; the first comes back at {time.strftime('%H:%M', time.localtime(ends))} unless it is "
                "labelled"
            )
        if strategy.of_labelled and not choice:
            return f"no image has a final label yet, and {strategy.name} proposes labelled ones only"
        if self._unreadable:
            listed = ", ".join(sorted(self._unreadable)[:5])
            return f"there is no other image to propose; these cannot be read: {listed}"
        return ALL_LABELLED

    def worklist(self) -> dict[str, Any]:
        """Unlabelled cases from worst to best by the Dice that is expected of the published model's mask."""
        version = self._models.version()
        unlabelled = self._datastore().get_unlabeled_images()
        known = {case: found for case in unlabelled if (found := self.quality(case)) is not None}
        ranked = sorted(known, key=lambda case: (known[case].mean if known[case].dice else -1.0, case))
        return {
            "model_version": None if version == PLAIN else version,
            "cases": [{"id": case, **known[case].to_dict()} for case in ranked],
            "not_examined_yet": sorted(set(unlabelled) - set(known)),
            "unreadable": dict(self._unreadable),
        }

    def quality(self, image: str) -> Quality | None:
        """What the published model's mask of an image is probably worth; None where it has not looked yet."""
        candidate = self._candidate(image)
        if candidate.examination is None or not self._models.trained():
            return None
        info = self._models.current().model.info
        return quality(info.labels.names, candidate.examination, info.training.get("calibration", {}))

    # ----

    def _rank(self, strategy: Strategy, client: str | None) -> list[Proposal]:
        """Some of the best cases that ``client`` may be given; none where there is none."""
        store = self._datastore()
        unlabelled = sorted(case for case in store.get_unlabeled_images() if case not in self._unreadable)
        labelled, held = sorted(store.get_labeled_images()), self.leases.held()
        free = [case for case in unlabelled if case not in held]
        # Where nothing is left but what somebody has, that goes round.
        waiting, leased = (free, [case for case in unlabelled if case in held]) if free else (unlabelled, [])
        pool = Pool(
            [self._candidate(case) for case in waiting],
            [self._candidate(case) for case in labelled],
            self._models.current().model.info.labels.names if self._models.trained() else (),
            self._seed + len(labelled),
            [self._candidate(case) for case in leased],
        )
        beside = sum(case in held for case in (labelled if strategy.of_labelled else waiting))
        ranking = [one for one in strategy.rank(pool, beside + AHEAD) if one.id not in self._unreadable]
        proposals = {proposal.id: proposal for proposal in ranking}
        self._order = [*leased, *proposals]
        return [proposals[case] for case in self.leases.free(list(proposals), client)]

    def _answer(self, strategy: Strategy, proposal: Proposal) -> dict[str, Any]:
        answer = {
            "id": proposal.id,
            "slices": proposal.slices,
            "reason": proposal.reason,
            "chosen_by": strategy.name,
        }
        return {**answer, "skipped": dict(self._unreadable)} if self._unreadable else answer

    def _readable(self, image: str) -> bool:
        """Whoever is given the image reads it next, so this reads it for them (a PACS begins to send it)."""
        try:
            self._datastore().make_ready(image)
        except UnavailableError:
            raise
        except (SamAdaptError, OSError) as error:
            logger.warning("%s is skipped: %s", image, error)
            self.unreadable(image, str(error))
            return False
        return True

    def _candidate(self, image: str) -> Candidate:
        path = self._datastore().local_image(image)
        if path is None:  # of a PACS that nobody has looked at; it is not fetched for this
            return Candidate(image, patient=self._patient(image))
        version = self._models.version()
        proposed = self._datastore().last_proposed(image)
        label = self._datastore().local_label(image)
        known = self._survey.candidate(image, path, None if version == PLAIN else version, proposed, label)
        return replace(known, confirmed=self._datastore().is_confirmed(image), patient=self._patient(image))

    def _patient(self, image: str) -> str | None:
        case = self._case(image)
        return case.patient if case else self._datastore().get_image_info(image).get("PatientID")

    def _labelled_case(self, image: str) -> Case | None:
        """The image with its final label, None where it has none."""
        if self._datastore().local_label(image) is None:
            return None
        case = self._case(image)
        return case if case and case.label else None

    def _case(self, image: str) -> Case | None:
        """The image as trainings see it; None for one of a PACS that is not on this machine."""
        if (times := self._times()) != self._cases_of:
            found = assume(find_cases(self._studies), self._coverage)
            self._cases, self._cases_of = {case.id: case for case in found}, times
        return self._cases.get(image)

    def _times(self) -> tuple[int, ...]:
        """When images, labels and what is known of them last changed."""
        folders = (self._studies, self._studies / "labels", self._studies / "labels" / FINAL)
        return tuple(path.stat().st_mtime_ns for path in folders if path.exists())


def _encoder(config: AppConfig) -> str:
    """Names the frozen encoder: descriptors of different ones, or of the same with other weights, do not fit."""
    name = f"{config.backbone}-{config.image_size or 'auto'}"
    return f"{name}-{sha256_of(config.weights)[:16]}" if config.weights else name
