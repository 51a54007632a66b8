/** Binary parts of the page, which it holds compressed by gzip and written in base64. */

/**
 * Unpack an asset.
 * @param {string} text
 * @returns {Promise<Uint8Array>}
 */
export async function unpackAsset(text) {
  const letters = atob(text.trim());
  const packed = new Uint8Array(letters.length);
  for (let i = 0; i < letters.length; i++) packed[i] = letters.charCodeAt(i);
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}
