"""What each of our plugins is, in a line, by family: `genfuse list` imports nothing that could say so itself."""

FAMILIES = {
    "models": {
        "variational autoencoders": {
            "vae": "encoder and decoder: latents, reconstructions, bounds",
        },
        "adversarial networks": {
            "gan": "generator against discriminator: sharp samples, no density",
            "wgan": "Wasserstein GAN with clipped weights: steadier, slower",
            "wgan-gp": "Wasserstein GAN with a gradient penalty: the steadiest",
        },
        "normalizing flows: exact densities": {
            "realnvp": "affine couplings: density and samples in one pass; of tables",
            "glow": "realnvp with learned channel mixing, for images",
            "idf": "couplings of integers: for compression without loss",
            "nsf": "spline couplings: as quick as realnvp, fits more",
            "maf": "autoregressive: density in one pass, samples slower",
            "iaf": "maf turned round: samples in one pass, density slower",
            "nsf-ar": "autoregressive splines: the best densities of tables",
            "planar": "planar layers: for two or few dimensions",
            "radial": "radial layers: for two or few dimensions",
        },
        "diffusion": {
            "ddpm": "noise removed step by step, with a bound on the density",
            "edm": "the design of Karras et al.: good samples in few steps",
            "flow-matching": "straight paths from noise to data",
            "score": "noise conditional scores, annealed Langevin sampling",
        },
    },
    "datasets": {
        "images": {
            "digits": "1,797 digits of 8 x 8 pixels: needs no files",
            "glyphs": "12,000 drawn digits of 28 x 28 pixels: needs no files",
            "mnist": "70,000 handwritten digits of 28 x 28 pixels",
            "fashion-mnist": "70,000 garments of 28 x 28 pixels",
            "stacked-mnist": "three digits of MNIST as the colours of an image",
            "binarized-mnist": "MNIST of black and white, with a validation split",
            "sprites": "shapes of known scale, turn and place, as dSprites",
            "photos": "patches of photographs: needs scikit-image",
            "clips": "digits that bounce: T frames as the channels of an image",
            "images": "images:FOLDER, pictures of your own; images:FILE.npy",
        },
        "tables": {
            "csv": "csv:FILE, a table of your own",
            "npy": "npy:FILE, an array of your own",
            "npz": "npz:FILE, arrays of your own, perhaps with labels",
        },
        "points in two dimensions": {
            "toy": "toy:moons, rings, pinwheel, checkerboard, grid, ...",
        },
    },
    "metrics": {
        "of samples beside real examples": {
            "frechet-distance": "of Gaussians fitted to features (as FID)",
            "kernel-distance": "maximum mean discrepancy of features (as KID)",
            "precision-recall": "quality and diversity, by nearest neighbours",
            "sliced-wasserstein": "of features, over random directions",
            "stacked-modes": "how many of 1,000 triples of digits have samples",
            "modes": "how many of a toy's known modes have samples",
        },
        "of codes beside known factors": {
            "mig": "mutual information gap: one latent for each factor?",
            "dci": "disentanglement, completeness, informativeness, by trees",
            "factor-vae-score": "which factor is fixed, by the steadiest latent",
            "beta-vae-score": "which factor is fixed, by a linear classifier",
            "kl-parts": "mutual information, total correlation, dimension-wise KL",
        },
        "of rows beside those of a table": {
            "marginals": "each column by itself",
            "correlations": "each two columns together",
            "detection": "how well a classifier tells real from fake",
            "usefulness": "train on samples, test on real rows",
        },
    },
}
