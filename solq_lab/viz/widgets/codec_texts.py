"""What the codec explorer says about its controls."""

DRAWING = (
    "Draw with the mouse, erase with the shift key held: the mask is encoded as you draw. Or upload an image of a mask "
    "above, light on dark. Fitted codecs are those of the first data set."
)
TOOLTIPS = {
    "data_set": "whose images and objects are shown; fitted codecs, as PCA, are fitted to its masks",
    "object": "class and box, pixels",
    "method": "the codec: what a vector means",
    "mask_size": "N: the mask is drawn into N x N pixels of its box",
    "vector_dim": "how many numbers a mask becomes",
    "rule": "which value parts the mask from the background",
    "error": "normal noise on the vector, in standard deviations of each entry over the data set",
    "step": "entries are rounded to multiples of this, in their standard deviation over the data set",
    "terms": "how many of the vector's entries are decoded; press play to add one after the other",
    "compare": "fit PCA and sparse coding at this N, so that their lines can be drawn",
    "search": "look through the data set with this codec and threshold",
    "pin": "keep this method, N, n_k and threshold below, for every object that follows; a click takes it back",
    "least_side": "only objects whose box is at least as large as this square",
}
