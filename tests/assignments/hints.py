"""Three hints to every exercise: where to look, how to think of it, almost the line. See `course.py hint 1.3 2`."""

HINTS = {
    "1.1": (
        "Write down by hand what one row of four rewards gives. Which three rewards is each compared with?",
        "The sum of the others is the sum of the row minus the own reward, and there are k - 1 of them.",
        "sum over dim=1 with keepdim=True has the shape (N, 1) and can be subtracted from (N, k).",
    ),
    "1.2": (
        "Begin with two loops, over rows and over tokens, and add up what the mask lets through. Then vectorise.",
        "advantages has the shape (B,), logps (B, C): an axis is missing. With B = C a wrong one gives no error.",
        "Everything is multiplied first, then summed once, then divided by total_tokens; do not forget the minus.",
    ),
    "1.3": (
        "Which position of the logits says something about the first token of the answer? Read `read` in model.py.",
        "A causal model's logits at t - 1 are about token t. So the last token's own logits are not needed.",
        "log_softmax over the vocabulary, gather the tokens that came, put the rows into a (B, C) of zeros.",
    ),
    "1.4": (
        "What does a batch cost that is padded? Not the sum of its lengths.",
        "Longest row first: then the first row of a batch is what all others are padded to.",
        "Close the batch when (length of its first row) * (rows + 1), plus what the prompts cost, is above the budget.",
    ),
    "1.5": (
        "In pseudo-code: for each batch of rows: log-probs, weights, loss, backward. What must stand outside the loop?",
        "The denominator is that of the whole batch, or the gradient depends on the split. Rows keep their advantages.",
        "batches() gives numbers within the rows that you handed to it, not within all rows: translate them back.",
    ),
    "1.6": (
        "What is log(pi / mu)? Which of pi and mu is on top?",
        "Subtract the logarithms first and take exp of the difference; the quotient of two tiny numbers is 0 / 0.",
        "Only large ratios are cut, and no gradient flows through the result.",
    ),
    "2.1": (
        "torch has a way to see and to replace a module's output: register_forward_hook. Who removes the hook again?",
        "What a hook returns replaces the output. A lambda in a loop sees the loop's last value: bind it.",
        "try: yield, finally: remove every handle. In this version of transformers a layer returns a tensor, no tuple.",
    ),
    "2.2": (
        "Print the modules of a layer of two families: `for name, _ in block.named_modules(): print(name)`.",
        "`split` takes a place apart, and SITES_OF holds the names of a family.",
        "The end of a layer is the MLP in the families of PRE_NORM, and the whole layer in the others.",
    ),
    "2.3": (
        "Write the shapes beside every product: x (B, T, F), A (r, F), B (D, r). What must come out?",
        "x @ A.T has the shape (B, T, r): r numbers for every token. What makes D numbers of them?",
        "The mask has the shape (B, T) or (1, 1); the step (B, T, D) or (D,). One axis is missing.",
    ),
    "2.4": (
        "Draw the probabilities of four tokens side by side on a line from 0 to 1. The noise is a point on it.",
        "Cumulate in float32, in the order of the vocabulary; count how many ends lie at or below the point.",
        "Rounding can leave the last end just below 1: what happens to a point above it?",
    ),
    "2.5": (
        "What is the part of s along one unit vector b?",
        "The rows of basis are orthonormal, so the parts along them can be found one by one and all be subtracted.",
        "basis @ s gives the n coefficients; which product turns them into a vector of D numbers?",
    ),
    "3.1": (
        "One product gives all dot products. Which two norms make a cosine of them, and which shape does each have?",
        "A row of zeros has no direction. Which number would you put there, and what does 0 / 0 give?",
        "torch.nn.functional.cosine_similarity takes care of zeros.",
    ),
    "3.2": (
        "The final norm multiplies by a gain. In some families that gain is not the weight: how could you measure it?",
        "What does the norm make of a row of ones? Its RMS is 1 already.",
        "Send ones through the norm itself, and multiply the rows of U by what comes out.",
    ),
    "3.3": (
        "Read the docstring of next_tokens: what does it yield for several sets of vectors?",
        "Ask for the base model and the steered one together, and subtract probabilities, not their logarithms.",
        "max over the last axis gives values and indices; zip them with rows and positions, from every chunk.",
    ),
    "3.4": (
        "The mean of cos(Delta, m) over tokens with a fixed m is (sum of unit vectors) . m / (|m| tokens).",
        "m is the mean of the shifts as they are, over all texts; its length does not matter, its direction does.",
        "Sum units and shifts over texts, divide by the sum of counts, for each layer. Long texts count more.",
    ),
    "3.5": (
        "Draw block l + 1: norm, attention, plus; norm, MLP, plus. Where is the vector seen by everything?",
        "A vector at the end of a layer is read by the next block's attention. Which place comes right after that?",
        "Three dictionaries {place: s}: the layer itself, the next layer's attention site, the next layer's end.",
    ),
    "3.6": (
        "q_proj and k_proj have one row for each number of each head.",
        "Rows of q_proj divided by the size of a head is the number of query heads; it need not be D / size.",
        "A last layer has no successor: stop with a line that says so, before an index error does.",
    ),
    "3.7": (
        "Try two problems by hand, one with a large KL and one with a tiny one. What does a mean of ratios do?",
        "The reference stands in the numerator in place of base; the denominator stays.",
        "Estimates of paired sums can be subtracted and divided: every draw takes the same problems in both.",
    ),
    "3.8": (
        "Which of the two singles is better may change from draw to draw. What does that do to the interval?",
        "Estimate.largest chooses in every draw. The share has a method of its own in Estimate.",
        "Three entries: the share of the gain of all layers, the difference to the better single, and the 99 % mark.",
    ),
    "3.9": (
        "What must be the same for two estimates, so that their difference is paired?",
        "A generator of its own with a fixed seed gives the same numbers whenever it is asked.",
        "integers(0, n, size=(draws, n)) never draws n itself, and draws with replacement.",
    ),
}
