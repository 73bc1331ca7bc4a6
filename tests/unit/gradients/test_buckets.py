"""Buckets and groups of gradients, by hand."""

from hvdext.gradients import buckets


def test_buckets_start_with_the_last_gradient():
    assert buckets.buckets([1, 1, 1], "aaa", limit=10) == [[2, 1, 0]]


def test_a_full_bucket_leaves_before_the_next_is_opened():
    # 4 + 3 fit into 7; 2 does not any more; 2 + 5 fit again.
    assert buckets.buckets([5, 2, 3, 4], "aaaa", limit=7) == [[3, 2], [1, 0]]


def test_a_gradient_larger_than_the_limit_travels_alone():
    assert buckets.buckets([1, 100, 1], "aaa", limit=10) == [[2], [1], [0]]


def test_kinds_do_not_mix():
    assert buckets.buckets([1, 1, 1, 1], "abab", limit=10) == [[3, 1], [2, 0]]


def test_no_gradients_make_no_buckets():
    assert buckets.buckets([], []) == []
    assert buckets.grouped(0, [], 2) == []  # all gradients are sparse
    assert buckets.grouped(0, [], []) == []


def test_a_number_of_groups_cuts_into_nearly_equal_lengths():
    assert buckets.grouped(5, "aaaaa", 2) == [[4, 3], [2, 1, 0]]


def test_more_groups_than_gradients_are_one_each():
    assert buckets.grouped(2, "aa", 5) == [[1], [0]]


def test_lists_travel_together_and_others_alone():
    assert buckets.grouped(5, "aaaaa", [[0, 3], [1]]) == [[4], [3, 0], [2], [1]]


def test_a_group_of_two_kinds_is_split():
    assert buckets.grouped(3, "aba", [[0, 1, 2]]) == [[2, 0], [1]]


def test_every_gradient_is_in_exactly_one_bucket():
    sizes, kinds = list(range(1, 30)), ["ab"[i % 2] for i in range(29)]
    for lists in (buckets.buckets(sizes, kinds, 40), buckets.grouped(29, kinds, 4)):
        assert sorted(i for members in lists for i in members) == list(range(29))
