"""A folder of DICOM files as a DICOMweb server: QIDO-RS, WADO-RS and STOW-RS on the loopback interface.

For the first hour without a PACS. ``python -m samadapt.dicomweb FOLDER`` runs it by itself; ``samadapt serve`` starts
it beside the label server, in a process of its own, so that images load while that one is busy.

pydicom reads, writes and converts. ``dicomweb_client.file.DICOMfileClient``, which looks like the rest of it, is not
used, because in 0.59.3 (the last for pydicom 2): its index reads every file again at each start and never drops one
that is gone; its connection works in one thread only; ``retrieve_study_metadata`` finds nothing (it takes study and
series for each other); filters on descriptions and on ModalitiesInStudy are skipped, so that everything matches;
frames of implicit little endian files, the most frequent kind, cannot be read; a file is entered into the index
before it is on disk, and written in place.
"""
