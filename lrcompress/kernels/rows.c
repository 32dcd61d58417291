/* Products with weights that are stored row by row, as numbers or in fewer bytes, and rows of them as numbers.

   A row is decoded in blocks of 16 columns, in registers: what multiplies never sees a decoded weight. Every form of rows
   says how a row begins and what its next block is; PRODUCTS makes of that y = x Wᵀ, y = x W and rows as numbers, under
   the names that products.py calls. All that is added is added in float32. */
#include "rows_quantized.h"
#include "rows_sparse.h"
#include "rows_pairs.h"
#include "rows_numbers.h"
#include "rows_products.h"
#include "rows_gathered.h"
#include "placing.h"

GATHERED(masked, Masked)
GATHERED(indexed, Indexed)
PRODUCTS(quantized2, Quantized, quantized, 2, 1)
PRODUCTS(quantized3, Quantized, quantized, 3, 1)
PRODUCTS(quantized4, Quantized, quantized, 4, 1)
PRODUCTS(quantized8, Quantized, quantized, 8, 4)
PRODUCTS(masked, Masked, masked, 0, 1)
PRODUCTS(indexed, Indexed, indexed, 0, 1)
PRODUCTS(pairs, Pairs, pairs, 0, 1)
PRODUCTS(numbers0, Numbers, numbers, FLOAT32, 4)
PRODUCTS(numbers1, Numbers, numbers, BFLOAT16, 4)
