/* Products with integer codes held in tiles of their own width, the fast twin of lrcompress/kernels/tiles.py: the layout is
   described in tiles_layout.h. */
#include "tiles_multiply.h"
#include "tiles_unpack.h"
#include "tiles_pack.h"
