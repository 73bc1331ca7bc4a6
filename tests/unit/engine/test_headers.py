"""Extra include folders exist exactly where TensorFlow needs them."""

from hvdext.engine.headers import extra_include_dirs

OLD = "tensorflow/compiler/xla/client/xla_builder.h"
NEW = "xla/hlo/builder/xla_builder.h"


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("")


def test_a_moved_header_is_forwarded(tmp_path):
    touch(tmp_path / "tf" / NEW)

    (folder,) = extra_include_dirs(tmp_path / "tf", tmp_path)

    assert (folder / OLD).read_text() == f'#include "{NEW}"\n'


def test_a_header_in_its_old_place_is_left_alone(tmp_path):
    touch(tmp_path / "tf" / NEW)
    touch(tmp_path / "tf" / OLD)

    assert extra_include_dirs(tmp_path / "tf", tmp_path) == []


def test_no_header_is_forwarded_to_nowhere(tmp_path):
    (tmp_path / "tf").mkdir()

    assert extra_include_dirs(tmp_path / "tf", tmp_path) == []


def test_bundled_folders_are_added(tmp_path):
    bundled = tmp_path / "external" / "highwayhash"
    bundled.mkdir(parents=True)

    assert extra_include_dirs(tmp_path, tmp_path) == [bundled]
