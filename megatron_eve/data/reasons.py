"""Why a row of the input, or one of its pictures, is left out of a dataset."""

from __future__ import annotations

REASONS = {
    "broken_json": "the row is not JSON (a file that holds an array must not be named .jsonl or .ndjson)",
    "not_an_object": "the row is not a JSON object",
    "no_conversation": "'conversations' is not a list with turns in it",
    "unknown_role": "a turn is from neither 'human' nor 'gpt'",
    "value_not_text": "a turn's value is not a string",
    "text_not_unicode": "a turn's text is not valid Unicode",
    "text_too_long": "a row's texts have more than 4 million characters: split them",
    "role_order": "turns do not alternate between 'human' and 'gpt'",
    "kind_template": "--template does not take the row: plain takes captions, vicuna_v1 conversations, document "
    "texts with pictures in them or without",
    "document_turns": "a document, a pair or a text has more than one turn, or one that is not from 'gpt'",
    "plain_turns": "the plain template takes two turns, a question and a caption",
    "plain_without_image": "the plain template takes captions, and there is no image",
    "image_in_caption": "the plain template takes <image> in the question only",
    "image_without_placeholder": "the row has an image, but its text no <image>",
    "placeholder_without_image": "the text has <image>, but the row no image",
    "image_count": "not as many <image> as images",
    "other_placeholder": "the text has a tag such as <image1> or <video> where <image> is due",
    "other_media": "the row has a video or sound, and no image",
    "nothing_to_train": "no token trains: answers are empty or white space, or cut off by --model-max-length",
    "image_field": "'image' (or 'images') is neither a file name nor a list of them, or stands under another key",
    "image_outside_root": "an absolute path, or a path or link that leaves --image-root (--follow-links allows links)",
    "image_missing": "no such file under --image-root",
    "image_not_a_file": "a directory or something else that is not a file",
    "image_unreadable": "the file cannot be read",
    "image_file_too_large": "the file has 2 GiB or more",
    "image_empty": "the file is empty",
    "image_lfs_pointer": "a git-lfs pointer, not the image itself: run git lfs pull in --image-root",
    "image_format": "not an image in an accepted format",
    "image_too_large": "more pixels than --max-image-pixels",
    "image_damaged": "the image is truncated or corrupt",
    "key_without_picture": "no picture among the members of a key (their name up to its first dot), which have to "
    "stand one behind the other in a shard: make it again with tar --sort=name",
    "key_twice": "two pictures, captions or JSONs of one key",
    "member_not_a_file": "a member of a tar that is a link or a device: it is not followed",
    "member_outside": "a member of a tar with an absolute path, or with .. in its name",
    "member_too_large": "a caption, or the JSON beside a picture, has more than 16 MiB",
    "document_layout": "not a document of MMC4: text_list, image_info or similarity_matrix is missing or does not fit",
    "matched_text_index": "a picture of a document is matched to a sentence that is not there",
    "text_field": "a row of text has neither 'text' nor 'inputs' and 'targets'",
    "csv_fields": "a row of a CSV has other fields than its first line",
    "parquet_row": "a row of parquet: a picture is null or no bytes, a column has another type than it should, or its "
    "kind is none of those in docs/data.md",
    "license_dropped": "its license matches --drop-license",
    "opted_out": "its id, a URL or the sha256 of one of its pictures stands in --opt-out",
    "download_failed": "img2dataset could not download the picture: its status is not success",
}
"""Why a row can be left out: the key that it is counted by, and what that means."""
