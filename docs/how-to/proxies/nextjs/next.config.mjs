/** @type {import("next").NextConfig} */
export default {
  async rewrites() {
    return {
      // `beforeFiles` comes before the file system: a route that an earlier chat has left in
      // app/api/chat/ or pages/api/chat/ cannot answer in Sottovoce's place.
      beforeFiles: [{ source: "/api/chat/:path*", destination: "/sottovoce/:path*" }],
    };
  },
};
