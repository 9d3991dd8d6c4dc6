"""The guards: lines that hold a promise of docs/reliability.md, and for each the test that fails without it."""

from typing import NamedTuple


class Guard(NamedTuple):
    """Without it `old`, which stands once in `file`, reads `new`, and `test` must fail."""

    name: str
    file: str
    old: str
    new: str
    test: str


STORAGE, GUARDED = "tests/test_cache_tools_storage.py::", "tests/test_reliability_guarded.py::"
STREAM, CACHE = "tests/test_mcm_stream.py::", "tests/test_cache_tools_cache.py::"
ORDER = GUARDED + "test_a_shard_stops_counting_before_it_is_redone_and_counts_last"
PUBLISHED = GUARDED + "test_what_is_published_is_durable_before_it_has_its_name"
ROTATED = GUARDED + "test_an_old_checkpoint_goes_when_the_new_one_is_there_and_its_state_goes_first"
OF_ONE_SHARD = GUARDED + "test_a_commit_is_of_one_shard_of_one_unit_of_one_cache"

GUARDS = [
    # Durable and whole, or not there
    Guard(
        "fsync of a file before its name",
        "cache_tools/storage.py",
        "                    os.fsync(self._file.fileno())\n",
        "",
        STORAGE + "test_atomic_file_is_whole_hashed_and_fsynced",
    ),
    Guard(
        "fsync of the folder behind a rename",
        "cache_tools/storage.py",
        "        if kind is None:\n            _sync_dir(self.path.parent)\n        else:\n",
        "        if kind is not None:\n",
        STORAGE + "test_atomic_file_is_whole_hashed_and_fsynced",
    ),
    Guard(
        "written beside, then renamed",
        "cache_tools/storage.py",
        'temp = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")',
        "temp = path",
        STORAGE + "test_a_failed_write_leaves_the_old_file",
    ),
    Guard(
        "fsync of the folder above a new one",
        "cache_tools/storage.py",
        "                raise\n        _sync_dir(path.parent)\n",
        "                raise\n",
        PUBLISHED,
    ),
    Guard(
        "what is there is not published over",
        "cache_tools/storage.py",
        "        if self._replace:",
        "        if True:",
        STORAGE + "test_the_first_of_two_publishers_wins",
    ),
    Guard(
        "what is there is compared",
        "cache_tools/storage.py",
        "    if compare and path.read_bytes() != data:",
        "    if False:",
        STORAGE + "test_publish_never_replaces",
    ),
    Guard(
        "a lock excludes",
        "cache_tools/storage.py",
        "        yield _flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB) is not False",
        "        yield True",
        STORAGE + "test_a_lock_is_exclusive_and_dies_with_its_process",
    ),
    Guard(
        "a short read is an error",
        "cache_tools/storage.py",
        "    if found != out.nbytes:",
        "    if False:",
        STORAGE + "test_read_at_names_what_is_short_or_missing",
    ),
    # A shard is committed whole, or does not count
    Guard(
        "commit removed before its shard is redone",
        "cache_tools/writer.py",
        "        remove(unit.commit_file(self.shard))\n",
        "",
        ORDER,
    ),
    Guard(
        "manifest removed before a shard is redone",
        "cache_tools/writer.py",
        "        remove(unit.manifest_file)\n",
        "",
        ORDER,
    ),
    Guard(
        "commit behind the data",
        "cache_tools/writer.py",
        "        self._stack.close()\n",
        '        write_atomic(unit.commit_file(self.shard), b"begun")\n        self._stack.close()\n',
        ORDER,
    ),
    Guard(
        "manifest when every commit is there",
        "cache_tools/writer.py",
        "len(unit.committed()) == unit.num_shards",
        "unit.committed()",
        GUARDED + "test_a_held_shard_is_left_to_its_holder",
    ),
    Guard(
        "no shard of another worker",
        "pipeline/extract.py",
        "                if held and missing:",
        "                if missing:",
        GUARDED + "test_a_held_shard_is_left_to_its_holder",
    ),
    Guard(
        "size of a shard that is resumed behind",
        "pipeline/shard_split.py",
        "tar.stat().st_size == record.entry.tar_bytes",
        "True",
        "tests/test_pipeline_shard.py::test_a_signal_stops_behind_a_shard_and_damage_is_named",
    ),
    # What is read is what was written
    Guard(
        "crc32c of a chunk",
        "cache_tools/arrays.py",
        "    if crc32c(stored) != expected_crc32c:",
        "    if False:",
        STREAM + "test_damage_stops_by_name[a bit of the codes]",
    ),
    Guard(
        "crc32c of a picture",
        "cache_tools/tars.py",
        "    if crc32c(data) != expected_crc32c:",
        "    if False:",
        STREAM + "test_damage_stops_by_name[swapped pictures]",
    ),
    Guard(
        "crc32c of index records",
        "cache_tools/cache.py",
        '        if index_crc32cs(index) != tuple(self._checksums(shard)["index"]):',
        "        if False:",
        STREAM + "test_damage_stops_by_name[a bit of the index]",
    ),
    Guard(
        "sha256 of a committed file",
        "cache_tools/verify.py",
        "    if not quick and file_sha256(path) != entry.sha256:",
        "    if False:",
        "tests/test_cache_tools_verify.py::test_swapped_chunks_and_swapped_files_are_named",
    ),
    Guard(
        "a commit is of its shard",
        "cache_tools/cache.py",
        "        found = (commit.identity_sha256, commit.split, commit.view, commit.shard, commit.rows)",
        "        found = (commit.identity_sha256, commit.split, commit.view, shard, commit.rows)",
        OF_ONE_SHARD,
    ),
    Guard(
        "a commit is of its view",
        "cache_tools/cache.py",
        "        found = (commit.identity_sha256, commit.split, commit.view, commit.shard, commit.rows)",
        "        found = (commit.identity_sha256, commit.split, self.view, commit.shard, commit.rows)",
        OF_ONE_SHARD,
    ),
    Guard(
        "a commit is of its cache",
        "cache_tools/cache.py",
        "        found = (commit.identity_sha256, commit.split, commit.view, commit.shard, commit.rows)",
        "        found = (self.identity_sha256, commit.split, commit.view, commit.shard, commit.rows)",
        OF_ONE_SHARD,
    ),
    Guard(
        "a manifest is of its unit and cache",
        "cache_tools/cache.py",
        "len(manifest.commits))\n        if found != (",
        "len(manifest.commits))\n        if () and found != (",
        OF_ONE_SHARD,
    ),
    Guard(
        "a commit is the manifest's",
        "cache_tools/cache.py",
        "        if self.complete and record_sha256(commit) != self.manifest.commits[shard]:",
        "        if False:",
        GUARDED + "test_the_manifest_knows_which_commits",
    ),
    Guard(
        "zarr.json byte for byte",
        "cache_tools/cache.py",
        "path.read_bytes() != expected:",
        "False:",
        GUARDED + "test_every_zarr_json_is_the_identitys",
    ),
    Guard(
        "sha256 of a DATASET's index",
        "cache_tools/dataset.py",
        "file_sha256(path) != entry.index_sha256",
        "False",
        "tests/test_reliability_damage.py::test_flipped_bits[dataset]",
    ),
    Guard(
        "sha256 inside a record",
        "cache_tools/records.py",
        "    if stored != sha256_hex(canonical) or",
        "    if",
        GUARDED + "test_a_record_has_one_form_and_its_own_digest",
    ),
    Guard(
        "one form of a record",
        "cache_tools/records.py",
        "sha256_hex(canonical) or whole != data:",
        "sha256_hex(canonical):",
        GUARDED + "test_a_record_has_one_form_and_its_own_digest",
    ),
    Guard(
        "no unknown key",
        "cache_tools/records.py",
        'extra="forbid"',
        'extra="ignore"',
        "tests/test_cache_tools_records.py::test_configuration_errors",
    ),
    Guard(
        "size of a view",
        "cache_tools/images.py",
        "                if (found_height, found_width) == (height, width):\n                    out",
        "                if True:\n                    out",
        GUARDED + "test_a_view_of_another_size_does_not_fill_one",
    ),
    # Data that may be written
    Guard(
        "features are finite",
        "pipeline/shard_features.py",
        "        self._check_finite(torch.cat(self.unfit), torch.cat(self.peaks))\n",
        "",
        "tests/test_pipeline_extract.py::test_features_that_cannot_be_stored_stop_the_shard",
    ),
    Guard(
        "fill is never data",
        "cache_tools/arrays.py",
        'FILL_INT8 if self.dtype == "int8" else math.nan',
        'FILL_INT8 if self.dtype == "int8" else 0.0',
        "tests/test_cache_tools_arrays.py::test_chunks_come_back_and_damage_is_named",
    ),
    Guard(
        "batches of one size, within a shard",
        "pipeline/shard_features.py",
        "np.zeros((self.fingerprint.batch, *",
        "np.zeros((len(inputs), *",
        GUARDED + "test_the_teacher_sees_batches_of_one_size",
    ),
    # Who it is
    Guard(
        "the request is the cache's",
        "cache_tools/writer.py",
        "        if found:\n",
        "        if False:\n",
        "tests/test_reliability_identity.py::test_extract_refuses_another_request[seed]",
    ),
    Guard(
        "probe features",
        "pipeline/extract.py",
        "    if not difference <= PROBE_TOLERANCE:",
        "    if False:",
        "tests/test_reliability_identity.py::test_probe_features_tell_what_no_field_does[before the final norm]",
    ),
    Guard(
        "weights loaded whole",
        "cache_tools/weights.py",
        "    if missing or unexpected:\n",
        "    if False:\n",
        "tests/test_pipeline_teachers.py::test_wrong_weight_files",
    ),
    Guard(
        "the run is of this cache",
        "mcm/run_folder.py",
        "        if found:\n",
        "        if False:\n",
        "tests/test_reliability_identity.py::test_pretrain_refuses_another_cache[seed]",
    ),
    # Sources that lie
    Guard(
        "no link is followed to a picture",
        "pipeline/candidates.py",
        "os.O_RDONLY | os.O_NOFOLLOW |",
        "os.O_RDONLY |",
        "tests/test_reliability_sources.py::test_files_that_change_after_they_were_listed_are_quarantined",
    ),
    Guard(
        "pixels of a picture",
        "cache_tools/images.py",
        "picture.width * picture.height > MAX_PIXELS",
        "False",
        "tests/test_cache_tools_images.py::test_refusals",
    ),
    Guard(
        "formats by content",
        "cache_tools/images.py",
        "    picture_extension(data)\n    try:\n        with Image.open(io.BytesIO(data), formats=FORMATS)",
        "    try:\n        with Image.open(io.BytesIO(data))",
        "tests/test_cache_tools_images.py::test_refusals",
    ),
    Guard(
        "weights are never unpickled",
        "cache_tools/weights.py",
        'map_location="cpu", weights_only=True)',
        'map_location="cpu", weights_only=False)',
        GUARDED + "test_a_pickle_is_not_executed",
    ),
    # Training
    Guard(
        "sha256 of a checkpoint",
        "mcm/checkpoint.py",
        "    if sha256_hex(data) != digest.sha256:",
        "    if False:",
        GUARDED + "test_a_flipped_weight_of_a_checkpoint_is_found",
    ),
    Guard(
        "a checkpoint is of its step",
        "mcm/checkpoint.py",
        "    if folder(path.parent.parent, state.step).name != path.name:",
        "    if False:",
        "tests/test_mcm_checkpoint.py::test_a_renamed_folder_is_refused",
    ),
    Guard(
        "the state of a checkpoint goes first",
        "mcm/checkpoint.py",
        '        remove(path / "state.json")  #',
        "        pass  #",
        ROTATED,
    ),
    Guard(
        "old checkpoints go behind the new one",
        "mcm/loop.py",
        "        checkpoint.save(run_dir",
        "        checkpoint.rotate(run_dir, self.saved_step, step, self.job.settings.keep_last)\n"
        "        checkpoint.save(run_dir",
        ROTATED,
    ),
    Guard(
        "no state of a loss that is not finite",
        "mcm/loop.py",
        "            if not all(map(math.isfinite, numbers)):",
        "            if False:",
        "tests/test_mcm_loop.py::test_a_poisoned_batch_stops_and_is_not_saved[50]",
    ),
    Guard(
        "masks hide the exact count",
        "mcm/masking.py",
        "    hidden = hidden_channels(width, ratio)\n",
        "    hidden = max(1, hidden_channels(width, ratio) - 1)\n",
        "tests/test_mcm_masking.py::test_every_mask_hides_exactly_the_count",
    ),
]
